/* The kernels of trellis codes with AVX-512 (VBMI, VNNI). */
#include "trellis.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDTH 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))
#define KERNELS quip_trellis_avx512
#include "trellis_vectors.h"

/* Each 64 bits get the eight bytes in which two states begin, the first byte highest (places[0]), of which eight bits from
 * any bit on make a byte of a state (places[1]). */
static void prepare(trellis_plan *plan) {
    for (int l = 0; l < WIDTH; l++) {
        const int pair = l / 2 * 2, byte = pair * plan->step_bits / 8, begin = l * plan->step_bits - 8 * byte;
        /* memory has the second byte of a word first */
        for (int i = 0; i < 8; i++) plan->places[0][4 * pair + 7 - i] = (uint8_t)((byte + i) ^ 1);
        for (int i = 0; i < 4; i++) plan->places[1][4 * l + i] = (uint8_t)(48 - begin + 8 * i);
    }
}

TARGET INLINE words states_in(const trellis_plan *plan, __m512i bytes) {
    const __m512i eight = _mm512_permutexvar_epi8(_mm512_load_si512(plan->places[0]), bytes);
    return (words)_mm512_maskz_multishift_epi64_epi8(0x3333333333333333, _mm512_load_si512(plan->places[1]), eight);
}

TARGET INLINE words states(const trellis_plan *plan, const uint8_t *bytes, int lane) {
    (void)lane;
    return states_in(plan, _mm512_loadu_si512(bytes));
}

TARGET INLINE words last_states(const trellis_plan *plan, const uint8_t *bytes, int lane, int16_t first) {
    (void)lane;
    return states_in(plan, _mm512_mask_set1_epi16(_mm512_loadu_si512(bytes), (__mmask32)1 << plan->step_bits, first));
}

TARGET INLINE words high_product(words h, uint32_t factor) {
    const __m512i all = (__m512i)h, factors = _mm512_set1_epi64(factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(all, 32), factors);
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(all, factors), 32);
    return (words)_mm512_mask_blend_epi32(0xaaaa, even, odd);
}

TARGET INLINE words byte_sums(words h) {
    return (words)_mm512_dpbusd_epi32(_mm512_set1_epi32(0x4b000000 + 1024), (__m512i)h, _mm512_set1_epi8(1));
}

TARGET INLINE words look_up(const void *table, words index) {
    return (words)_mm512_i32gather_epi32((__m512i)index, table, 4);
}

TARGET INLINE void look_up_pairs(const float *table, words index, floats *first, floats *second) {
    /* doubles are only moved, whatever the bits would mean */
    *first = (floats)_mm512_i32gather_pd(_mm512_castsi512_si256((__m512i)index), table, 8);
    *second = (floats)_mm512_i32gather_pd(_mm512_extracti64x4_epi64((__m512i)index, 1), table, 8);
}

TARGET INLINE void widen(words pairs, floats *first, floats *second) {
    *first = (floats)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)pairs));
    *second = (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)pairs, 1));
}

TARGET INLINE floats part_of_row(const float *weights, const int32_t *source) {
    const float *from = weights + (source[0] & ~31); /* the permutation looks at the lowest five bits */
    return (floats)_mm512_permutex2var_ps(_mm512_loadu_ps(from), _mm512_loadu_si512(source), _mm512_loadu_ps(from + 16));
}

#define FUSED(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "trellis_kernels.h"
#endif
