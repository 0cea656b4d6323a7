/* The steps of the trellis encoder with AVX-512. */
#include "viterbi.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDTH 32
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNELS quip_viterbi_avx512
#define UNROLL
typedef uint16_t costs __attribute__((vector_size(2 * WIDTH)));
typedef __mmask32 flags;

/* Bytes within each 16, or, for one new bit, numbers of 16 bits. */
TARGET INLINE costs pattern_for(int old) {
    costs pattern;
    for (int l = 0; l < WIDTH; l++) pattern[l] = (uint16_t)(old == 1 ? l >> 1 : (l >> old) * 0x0202 + 0x0100);
    return pattern;
}

TARGET INLINE costs expand(const uint16_t *before, const int old, costs pattern) {
    if (old == 1) {
        const __m256i sixteen = _mm256_loadu_si256((const __m256i *)before);
        return (costs)_mm512_permutexvar_epi16((__m512i)pattern, _mm512_castsi256_si512(sixteen));
    }
    const __m128i eight = _mm_loadu_si128((const __m128i *)before);
    return (costs)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(eight), (__m512i)pattern);
}

TARGET INLINE costs distance(costs values, costs x, const int doublings) {
    const __m512i d = _mm512_subs_epi16((__m512i)values, (__m512i)x);
    if (!doublings) return (costs)_mm512_mulhi_epi16(d, d);
    const __m512i error = _mm512_abs_epi16(d);
    const __m512i usual = _mm512_min_epu16(error, _mm512_set1_epi16((short)((1 << 15) >> doublings)));
    const __m512i q = _mm512_sll_epi16(usual, _mm_cvtsi32_si128(doublings));
    return (costs)_mm512_mulhi_epu16(q, q) + (costs)_mm512_srli_epi16(_mm512_sub_epi16(error, usual), 2);
}

TARGET INLINE costs add(costs a, costs b) {
    return (costs)_mm512_adds_epu16((__m512i)a, (__m512i)b);
}

TARGET INLINE costs least(costs a, costs b) {
    return (costs)_mm512_min_epu16((__m512i)a, (__m512i)b);
}

TARGET INLINE flags keeps(costs a, costs b) {
    return _mm512_cmple_epu16_mask((__m512i)a, (__m512i)b);
}

TARGET INLINE costs choose(flags yes, costs a, costs b) {
    return (costs)_mm512_mask_mov_epi16((__m512i)b, yes, (__m512i)a);
}

TARGET INLINE uint32_t bits_of(const flags *f) {
    return f[0];
}

TARGET INLINE void store_bytes(uint8_t *to, const costs *numbers) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8((__m512i)numbers[0]));
}

#include "viterbi_kernels.h"
#endif
