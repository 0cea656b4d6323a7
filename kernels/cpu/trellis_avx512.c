/* The kernels of trellis codes with AVX-512 (VBMI, VNNI, IFMA). */
#include "trellis.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDTH 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512ifma")))
#define KERNELS quip_trellis_avx512
#include "trellis_vectors.h"

/* Each 64 bits get the eight bytes in which two states begin, the first byte highest (places[2 * odd]), of which eight bits
 * from any bit on make a byte of a state (places[2 * odd + 1]). */
static void prepare(trellis_plan *plan) {
    for (int odd = 0; odd < 2; odd++)
        for (int l = 0; l < WIDTH; l++) {
            const int pair = l / 2, byte = odd + pair * plan->pair_bits / 8;
            const int begin = 8 * odd + (l * plan->pair_bits + 1) / 2 - 8 * byte;
            /* memory has the second byte of a word first; bits beyond 32 bytes are shifted away */
            for (int i = 0; i < 8; i++) plan->places[2 * odd][8 * pair + 7 - i] = (uint8_t)(((byte + i) ^ 1) & 31);
            for (int i = 0; i < 4; i++) plan->places[2 * odd + 1][4 * l + i] = (uint8_t)(48 - begin + 8 * i);
        }
}

/* Sixteen states lie in 32 bytes; a load of only these crosses two cache lines less often. */
TARGET INLINE words states_in(const trellis_plan *plan, __m256i bytes, int odd) {
    const uint8_t (*places)[64] = plan->places + 2 * odd;
    const __m512i eight = _mm512_permutexvar_epi8(_mm512_load_si512(places[0]), _mm512_castsi256_si512(bytes));
    return (words)_mm512_maskz_multishift_epi64_epi8(0x3333333333333333, _mm512_load_si512(places[1]), eight);
}

TARGET INLINE words states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd) {
    (void)lane;
    return states_in(plan, _mm256_loadu_si256((const __m256i *)bytes), odd);
}

TARGET INLINE words last_states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd, int16_t first) {
    (void)lane;
    const __m256i read = _mm256_loadu_si256((const __m256i *)bytes);
    const __mmask16 place = (__mmask16)(1u << (plan->pair_bits + odd) / 2);
    return states_in(plan, _mm256_mask_set1_epi16(read, place, first), odd);
}

/* In the lower halves of 64 bits. Operands and products are of 52 bits: g = A s + B is computed modulo 2^32 in the highest
 * of them, whatever is above s, and the upper half of the product of that with 2^32 + 1664525 is g + (1664525 g >> 32). */
TARGET INLINE __m512i two_mads_of_even(__m512i s) {
    const __m512i factor = _mm512_set1_epi64(264435761LL << 20), addend = _mm512_set1_epi64(1013904223LL << 20);
    const __m512i g = _mm512_madd52lo_epu64(addend, s, factor);
    return _mm512_madd52hi_epu64(_mm512_setzero_si512(), g, _mm512_set1_epi64((1LL << 32) + 1664525));
}

TARGET INLINE words two_mads(words s) {
    const __m512i even = two_mads_of_even((__m512i)s), odd = two_mads_of_even(_mm512_srli_epi64((__m512i)s, 32));
    return (words)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CDAB);
}

TARGET INLINE words byte_sums(words h) {
    return (words)_mm512_dpbusd_epi32(_mm512_set1_epi32(0x4b000000 + 1024), (__m512i)h, _mm512_set1_epi8(1));
}

/* A count for each lane takes one operation; one count for all lanes would take two. */
TARGET INLINE words shifted(words w, int count) {
    return (words)_mm512_srlv_epi32((__m512i)w, _mm512_set1_epi32(count));
}

TARGET INLINE words look_up(const void *table, words index) {
    return (words)_mm512_i32gather_epi32((__m512i)index, table, 4);
}

TARGET INLINE void look_up_pairs(const float *table, const words *index, floats *first, floats *second) {
    /* the bits are only moved, never used as doubles */
    const __m256i *half = (const __m256i *)index;
    *first = (floats)_mm512_i32gather_pd(_mm256_load_si256(half), table, 8);
    *second = (floats)_mm512_i32gather_pd(_mm256_load_si256(half + 1), table, 8);
}

TARGET INLINE void widen(words pairs, floats *first, floats *second) {
    *first = (floats)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)pairs));
    *second = (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)pairs, 1));
}

TARGET INLINE floats part_of_row(const float *weights, const int32_t *source) {
    const float *from = weights + (source[0] & ~31); /* the permutation reads only the lowest five bits */
    return (floats)_mm512_permutex2var_ps(_mm512_loadu_ps(from), _mm512_loadu_si512(source), _mm512_loadu_ps(from + 16));
}

#define FUSED(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "trellis_kernels.h"
#endif
