/* The kernels of trellis codes with AVX2, FMA and F16C. */
#include "trellis.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define WIDTH 8
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define KERNELS quip_trellis_avx2
#include "trellis_vectors.h"

/* The byte from which the bytes of a half of a group are counted: an even one. */
INLINE int first_byte(const trellis_plan *plan, int half, int odd) {
    return ((half * plan->pair_bits >> 1) + odd) & ~1;
}

/* A lane gets the four bytes in which its state begins, the first one highest; the state is then at most 7 bits too far up.
 * For either half h of a group: places[2 * odd + h] has 32 indices of bytes and eight shifts. */
static void prepare(trellis_plan *plan) {
    for (int variant = 0; variant < 4; variant++) {
        const int odd = variant / 2, h = variant % 2, from = first_byte(plan, h, odd);
        for (int l = 0; l < WIDTH; l++) {
            const int begin = 8 * odd + ((h * WIDTH + l) * plan->pair_bits + 1) / 2 - 8 * from, byte = begin / 8;
            /* memory has the second byte of a word first; bits beyond the sixteenth byte are shifted away */
            for (int i = 0; i < 4; i++) plan->places[variant][4 * l + 3 - i] = ((byte + i) ^ 1) & 15;
            const uint8_t shift[4] = {(uint8_t)(16 - begin % 8), 0, 0, 0};
            memcpy(plan->places[variant] + 32 + 4 * l, shift, sizeof shift);
        }
    }
}

TARGET INLINE words states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd) {
    const int half = lane / WIDTH, variant = 2 * odd + half;
    const __m128i part = _mm_loadu_si128((const __m128i *)(bytes + first_byte(plan, half, odd)));
    const __m256i index = _mm256_load_si256((const __m256i *)plan->places[variant]);
    const __m256i shift = _mm256_load_si256((const __m256i *)(plan->places[variant] + 32));
    const __m256i four = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), index);
    return (words)_mm256_srlv_epi32(four, shift) & 0xffffu;
}

TARGET INLINE words last_states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd, int16_t first) {
    uint8_t copy[MARGIN]; /* at most 32 bytes of this tile, then its first ones */
    memcpy(copy, bytes, 32);
    memcpy(copy + plan->pair_bits + odd, &first, sizeof first);
    return states(plan, copy, lane, odd);
}

TARGET INLINE words two_mads(words s) {
    const words g = s * 264435761u + 1013904223u;
    const __m256i factor = _mm256_set1_epi64x(1664525);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)g, 32), factor);
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32((__m256i)g, factor), 32);
    return g + (words)_mm256_blend_epi32(even, odd, 0xaa);
}

TARGET INLINE words byte_sums(words h) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)h, _mm256_set1_epi8(1));
    return (words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) + (0x4b000000u + 1024);
}

/* A count for each lane takes one operation; one count for all lanes would take two. */
TARGET INLINE words shifted(words w, int count) {
    return (words)_mm256_srlv_epi32((__m256i)w, _mm256_set1_epi32(count));
}

TARGET INLINE words look_up(const void *table, words index) {
    return (words)_mm256_i32gather_epi32((const int *)table, (__m256i)index, 4);
}

TARGET INLINE void look_up_pairs(const float *table, const words *index, floats *first, floats *second) {
    const double *pairs = (const double *)table; /* the bits are only moved, never used as doubles */
    const __m128i *half = (const __m128i *)index;
    *first = (floats)_mm256_i32gather_pd(pairs, _mm_load_si128(half), 8);
    *second = (floats)_mm256_i32gather_pd(pairs, _mm_load_si128(half + 1), 8);
}

TARGET INLINE void widen(words pairs, floats *first, floats *second) {
    *first = (floats)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)pairs));
    *second = (floats)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)pairs, 1));
}

TARGET INLINE floats part_of_row(const float *weights, const int32_t *source) {
    words index;
    memcpy(&index, source, sizeof index);
    return (floats)look_up(weights, index);
}

#define FUSED(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "trellis_kernels.h"
#endif
