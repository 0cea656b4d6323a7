/* Products of rows of codes with int8 planes, in plain C and with AVX2.
 *
 * A stretch of a row is first expanded to bytes 4 w + 31, by one table look-up for each byte of a code. The bytes stay in
 * the first-level cache and are multiplied by every plane. */
#include <string.h>

#include "common.h"

#define STRETCH 256 /* codes expanded at a time, a multiple of 8: 2 KiB */

HIDDEN void quip_expand(int codebook, const void *codes, int64_t first, int count, uint8_t *bytes) {
    const int16_t *words = (const int16_t *)codes + first;
    const uint8_t *octets = (const uint8_t *)codes + first;
    for (int k = 0; k < count; k++) {
        const uint64_t eight = codebook == QUIP_E8
                                   ? quip_e8_points[octets[k]]
                                   : quip_e8p_pattern[(uint16_t)words[k] >> 8] ^ quip_e8p_signs[words[k] & 255];
        memcpy(bytes + BLOCK * k, &eight, sizeof eight);
    }
}

HIDDEN void quip_products_plain(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                int64_t stride, int columns, int32_t (*sums)[LANES]) {
    uint8_t bytes[BLOCK * STRETCH];
    memset(sums, 0, (size_t)columns * sizeof *sums);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t first = 0; first < blocks; first += STRETCH) {
            const int count = blocks - first < STRETCH ? (int)(blocks - first) : STRETCH;
            quip_expand(codebook, codes, r * blocks + first, count, bytes);
            for (int c = 0; c < columns; c++) {
                const int8_t *x = planes + c * stride + BLOCK * first;
                int32_t sum = 0;
                for (int i = 0; i < BLOCK * count; i++) sum += bytes[i] * x[i];
                sums[c][r] += sum;
            }
        }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline int32_t total(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

AVX2 INLINE __m128i pair(const uint64_t *table, uint64_t first, uint64_t second) {
    const __m128d low = _mm_castsi128_pd(_mm_loadl_epi64((const __m128i *)(table + first)));
    return _mm_castpd_si128(_mm_loadh_pd(low, (const double *)(table + second)));
}

/* As `quip_expand` for E8P, for whole groups of four codes. */
AVX2 INLINE void expand_e8p(const int16_t *codes, int count, uint8_t *bytes) {
    for (int k = 0; k < count; k += 4) {
        uint64_t four;
        memcpy(&four, codes + k, sizeof four);
        const __m128i low = _mm_xor_si128(pair(quip_e8p_pattern, four >> 8 & 255, four >> 24 & 255),
                                          pair(quip_e8p_signs, four & 255, four >> 16 & 255));
        const __m128i high = _mm_xor_si128(pair(quip_e8p_pattern, four >> 40 & 255, four >> 56),
                                           pair(quip_e8p_signs, four >> 32 & 255, four >> 48 & 255));
        _mm256_store_si256((__m256i *)(bytes + BLOCK * k), _mm256_set_m128i(high, low));
    }
}

/* A byte is at most 42, so that the sum of two products by vpmaddubsw stays within 16 bits: 4 * 42 * 128 < 2^15. */
AVX2 INLINE __m256i step(__m256i sum, const uint8_t *bytes, const int8_t *x) {
    const __m256i low = _mm256_maddubs_epi16(_mm256_load_si256((const __m256i *)bytes),
                                             _mm256_loadu_si256((const __m256i *)x));
    const __m256i high = _mm256_maddubs_epi16(_mm256_load_si256((const __m256i *)(bytes + 32)),
                                              _mm256_loadu_si256((const __m256i *)(x + 32)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1)));
}

AVX2 HIDDEN void quip_products_avx2(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                    int64_t stride, int columns, int32_t (*sums)[LANES]) {
    uint8_t bytes[BLOCK * STRETCH] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)columns * sizeof *sums);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t first = 0; first < blocks; first += STRETCH) {
            const int count = blocks - first < STRETCH ? (int)(blocks - first) : STRETCH;
            const int end = (count * BLOCK + 63) & ~63; /* planes are completed with zeros */
            const int whole = codebook == QUIP_E8P ? count & ~3 : 0; /* an E8 code is one load; vectors do not help */
            const int64_t begin = r * blocks + first;
            expand_e8p((const int16_t *)codes + begin, whole, bytes);
            quip_expand(codebook, codes, begin + whole, count - whole, bytes + BLOCK * whole);
            memset(bytes + BLOCK * count, 0, (size_t)(end - BLOCK * count));
            const int8_t *x = planes + BLOCK * first;
            int c = 0;
            for (; c + 3 <= columns; c += 3) {
                const int8_t *x0 = x + c * stride, *x1 = x0 + stride, *x2 = x1 + stride;
                __m256i a = _mm256_setzero_si256(), b = a, d = a;
                for (int i = 0; i < end; i += 64) {
                    a = step(a, bytes + i, x0 + i);
                    b = step(b, bytes + i, x1 + i);
                    d = step(d, bytes + i, x2 + i);
                }
                sums[c][r] += total(a);
                sums[c + 1][r] += total(b);
                sums[c + 2][r] += total(d);
            }
            for (; c < columns; c++) {
                const int8_t *x0 = x + c * stride;
                __m256i a = _mm256_setzero_si256(), b = a;
                int i = 0;
                for (; i + 64 < end; i += 128) {
                    a = step(a, bytes + i, x0 + i);
                    b = step(b, bytes + i + 64, x0 + i + 64);
                }
                if (i < end) a = step(a, bytes + i, x0 + i);
                sums[c][r] += total(_mm256_add_epi32(a, b));
            }
        }
}
#endif
