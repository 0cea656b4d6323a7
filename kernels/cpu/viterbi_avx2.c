/* The steps of the trellis encoder with AVX2. */
#include "viterbi.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDTH 16
#define TARGET __attribute__((target("avx2")))
#define KERNELS quip_viterbi_avx2
#define UNROLL _Pragma("GCC unroll 2")
typedef uint16_t costs __attribute__((vector_size(2 * WIDTH)));
typedef costs flags;

TARGET INLINE costs pattern_for(int old) {
    costs pattern; /* bytes of the same eight costs in both halves */
    for (int l = 0; l < WIDTH; l++) pattern[l] = (uint16_t)((l >> old) * 0x0202 + 0x0100);
    return pattern;
}

TARGET INLINE costs expand(const uint16_t *before, int old, costs pattern) {
    (void)old;
    const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)before));
    return (costs)_mm256_shuffle_epi8(eight, (__m256i)pattern);
}

TARGET INLINE costs distance(costs values, costs x, const int doublings) {
    const __m256i d = _mm256_subs_epi16((__m256i)values, (__m256i)x);
    if (!doublings) return (costs)_mm256_mulhi_epi16(d, d);
    const __m256i error = _mm256_abs_epi16(d);
    const __m256i usual = _mm256_min_epu16(error, _mm256_set1_epi16((short)((1 << 15) >> doublings)));
    const __m256i q = _mm256_sll_epi16(usual, _mm_cvtsi32_si128(doublings));
    return (costs)_mm256_mulhi_epu16(q, q) + (costs)_mm256_srli_epi16(_mm256_sub_epi16(error, usual), 2);
}

TARGET INLINE costs add(costs a, costs b) {
    return (costs)_mm256_adds_epu16((__m256i)a, (__m256i)b);
}

TARGET INLINE costs least(costs a, costs b) {
    return (costs)_mm256_min_epu16((__m256i)a, (__m256i)b);
}

TARGET INLINE flags keeps(costs a, costs b) {
    return (flags)_mm256_cmpeq_epi16(_mm256_min_epu16((__m256i)a, (__m256i)b), (__m256i)a);
}

TARGET INLINE costs choose(flags yes, costs a, costs b) {
    return (costs)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)yes);
}

/* Two vectors of 16 bits as one of bytes, in order: packing works in each half. */
TARGET INLINE __m256i in_order(__m256i packed) {
    return _mm256_permute4x64_epi64(packed, 0xd8);
}

TARGET INLINE uint32_t bits_of(const flags *f) {
    return (uint32_t)_mm256_movemask_epi8(in_order(_mm256_packs_epi16((__m256i)f[0], (__m256i)f[1])));
}

TARGET INLINE void store_bytes(uint8_t *to, const costs *numbers) {
    _mm256_storeu_si256((__m256i *)to, in_order(_mm256_packus_epi16((__m256i)numbers[0], (__m256i)numbers[1])));
}

#include "viterbi_kernels.h"
#endif
