/* Products of sixteen rows of codes with int8 planes, with AVX-512 (VBMI, VNNI, GFNI).
 *
 * Codes stay in their logical order: each row gives 8 codes, and shuffles bring the sixteen rows side by side, row r in
 * lane r. A group is then 16 rows x 4 codes: 64 bytes of E8, 64 high bytes and 64 low bytes of E8P.
* For E8, the bytes 4 w + 31 are looked up, coordinate by coordinate, in tables of 256 bytes. For E8P, the magnitudes of
 * all 512 weights come from a table of 256 x 16 bits that is kept in eight registers. An affine map over bits (GFNI) turns
 * each low byte into the contribution of sign and shift to coordinate j, and one ternary operation combines the two. The
 * resulting 64 bytes 4 w + 31 are multiplied and summed in fours by vpdpbusd. */
#include <string.h>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni")))
#define code_bytes(codebook) ((codebook) == QUIP_E8P ? 2 : 1)
#define ROW_CODES 8 /* codes of one row loaded at once: two groups */
#define FEW 4       /* planes whose sums are kept in registers */

typedef struct {
    __m512i low[4], high[4], sign[BLOCK], odd, magnitude;
} tables; /* of E8P */

AVX512 INLINE tables load_tables(const int codebook) {
    static const uint8_t sign_row[BLOCK] = {0xfe, 1 << 4, 1 << 1, 1 << 5, 1 << 2, 1 << 6, 1 << 3, 1 << 7};
    tables t;
    if (codebook != QUIP_E8P) return t;
    for (int i = 0; i < 4; i++) {
        t.low[i] = _mm512_loadu_si512(quip_e8p_low + 64 * i);
        t.high[i] = _mm512_loadu_si512(quip_e8p_high + 64 * i);
    }
    /* Row 7 - i of the matrix makes bit i: bit 1 is the parity of the low byte, bits 2 to 5 the sign. Bits 1 and 5 are
     * complemented by the constant of the map. Bit 0 of the low byte counts as a sign after its exclusive or with the
     * parity, so that its row is 0xff ^ 1. */
    for (int j = 0; j < BLOCK; j++)
        t.sign[j] = _mm512_set1_epi64((long long)(0xffull << 48 | (uint64_t)sign_row[j] * 0x0000010101010000ull));
    /* The parity of a pattern's digits, where they are odd; it changes the sign of coordinate 7. */
    t.odd = _mm512_set1_epi64((long long)(0x55ull * 0x0000010101010000ull));
    t.magnitude = _mm512_set1_epi8(0x0c);
    return t;
}

AVX512 INLINE __m512i look_up(const __m512i *table, __m512i index, __mmask64 upper) {
    return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(table[0], index, table[1]), upper,
                                _mm512_permutex2var_epi8(table[2], index, table[3]));
}

/* Bytes 4 w + 31 of coordinate j = 0..7 of 64 codes of E8P: `first` and `second` hold 4 codes a row, rows as in
 * `gather_e8p`. */
AVX512 INLINE void expand_e8p(const tables *t, __m512i first, __m512i second, __m512i *weights) {
    const __m512i byte = _mm512_set1_epi16(0xff);
    const __m512i index = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    const __m512i signs = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    const __m512i low = look_up(t->low, index, upper), high = look_up(t->high, index, upper);
    __m512i moved[BLOCK]; /* the digit of coordinate j at bits 2 and 3 */
    moved[0] = _mm512_slli_epi16(low, 2);
    moved[1] = low;
    moved[2] = _mm512_srli_epi16(low, 2);
    moved[3] = _mm512_srli_epi16(low, 4);
    moved[4] = _mm512_slli_epi16(high, 2);
    moved[5] = high;
    moved[6] = _mm512_srli_epi16(high, 2);
    moved[7] = _mm512_srli_epi16(high, 4);
#pragma GCC unroll 8
    for (int j = 0; j < BLOCK; j++) {
        __m512i sign = _mm512_gf2p8affine_epi64_epi8(signs, t->sign[j], 0x22);
        if (j == 7) sign = _mm512_xor_si512(sign, _mm512_gf2p8affine_epi64_epi8(_mm512_xor_si512(low, high), t->odd, 0));
        weights[j] = _mm512_ternarylogic_epi64(moved[j], t->magnitude, sign, 0x6a); /* (moved & magnitude) ^ sign */
    }
}

/* The same of 64 codes of E8, four a row. */
AVX512 INLINE void expand_e8(__m512i index, __m512i *weights) {
    const __mmask64 upper = _mm512_movepi8_mask(index);
#pragma GCC unroll 8
    for (int j = 0; j < BLOCK; j++) {
        __m512i table[4];
        for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512(quip_e8_coordinates[j] + 64 * i);
        weights[j] = look_up(table, index, upper);
    }
}

/* Eight codes of sixteen rows (fewer, where `present` says so), rearranged: words[0] and words[1] have the first four
 * codes of rows 0 1 4 5 8 9 12 13 and of the others, words[2] and words[3] the second four. Packing to bytes, which works
 * in quarters of a register, then gives the rows in their order. */
AVX512 INLINE void gather_e8p(const char *const *row, int64_t begin, __mmask8 present, __m512i *words) {
    __m512i four[4]; /* number i has rows i, i + 4, i + 8, i + 12 */
    for (int i = 0; i < 4; i++) {
        __m128i codes[4];
        for (int q = 0; q < 4; q++) {
            const int16_t *at = (const int16_t *)row[i + 4 * q] + begin;
            codes[q] = present == 0xff ? _mm_loadu_si128((const __m128i *)at) : _mm_maskz_loadu_epi16(present, at);
        }
        four[i] = _mm512_inserti32x4(_mm512_castsi128_si512(codes[0]), codes[1], 1);
        four[i] = _mm512_inserti32x4(_mm512_inserti32x4(four[i], codes[2], 2), codes[3], 3);
    }
    words[0] = _mm512_unpacklo_epi64(four[0], four[1]);
    words[1] = _mm512_unpacklo_epi64(four[2], four[3]);
    words[2] = _mm512_unpackhi_epi64(four[0], four[1]);
    words[3] = _mm512_unpackhi_epi64(four[2], four[3]);
}

/* Eight codes of sixteen rows of E8: words[0] has the first four codes of all rows, words[1] the second four. */
AVX512 INLINE void gather_e8(const char *const *row, int64_t begin, __mmask8 present, __m512i *words) {
    static const int32_t order[2][LANES] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
                                            {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}};
    uint64_t eight[LANES] __attribute__((aligned(64)));
    for (int r = 0; r < LANES; r++) {
        const char *at = row[r] + begin;
        if (present == 0xff)
            memcpy(&eight[r], at, sizeof eight[r]);
        else
            _mm_storel_epi64((__m128i *)&eight[r], _mm_maskz_loadu_epi8(present, at));
    }
    const __m512i first = _mm512_load_si512(eight), second = _mm512_load_si512(eight + LANES / 2);
    for (int k = 0; k < 2; k++) words[k] = _mm512_permutex2var_epi32(first, _mm512_loadu_si512(order[k]), second);
}

AVX512 INLINE void gather(const int codebook, const char *const *row, int64_t begin, __mmask8 present, __m512i *words) {
    if (codebook == QUIP_E8P)
        gather_e8p(row, begin, present, words);
    else
        gather_e8(row, begin, present, words);
}

/* The weights of the first four (k = 0) or second four codes that were gathered. */
AVX512 INLINE void expand(const int codebook, const tables *t, const __m512i *words, int k, __m512i *weights) {
    if (codebook == QUIP_E8P)
        expand_e8p(t, words[2 * k], words[2 * k + 1], weights);
    else
        expand_e8(words[k], weights);
}

/* Sixteen rows are read side by side, which hardware does not prefetch; the next sixteen are prefetched here, in order. */
INLINE void fetch_ahead(const int code_bytes, const char *const *row, int64_t blocks, int64_t begin) {
    const char *next = row[LANES - 1] + (blocks + begin * LANES) * code_bytes;
    for (int i = 0; i < ROW_CODES * LANES * code_bytes; i += 64) __builtin_prefetch(next + i);
}

AVX512 INLINE void add_few(const int codebook, const tables *t, const char *const *row, int64_t begin, __mmask8 present,
                           const int8_t *planes, int64_t stride, const int columns, const int chains, __m512i (*sum)[4]) {
    __m512i words[4], weights[BLOCK];
    const int8_t *x = planes + begin * BLOCK;
    gather(codebook, row, begin, present, words);
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++, x += 32) {
        expand(codebook, t, words, k, weights);
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK; j++)
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++)
                sum[c][j % chains] = _mm512_dpbusd_epi32(sum[c][j % chains], weights[j],
                                                         _mm512_set1_epi32(((const int32_t *)(x + c * stride))[j]));
    }
}

/* The whole product for a constant number of planes, summed in registers. */
AVX512 INLINE void few_planes(const int codebook, const tables *t, const char *const *row, int64_t blocks,
                              const int8_t *planes, int64_t stride, const int columns, int32_t (*sums)[LANES]) {
    const int chains = columns == 1 ? 4 : 2; /* vpdpbusd takes five cycles: several sums of each plane at a time */
    __m512i sum[FEW][4];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int i = 0; i < chains; i++) sum[c][i] = _mm512_setzero_si512();
    int64_t begin = 0;
    for (; begin + ROW_CODES <= blocks; begin += ROW_CODES) {
        fetch_ahead(code_bytes(codebook), row, blocks, begin);
        add_few(codebook, t, row, begin, 0xff, planes, stride, columns, chains, sum);
    }
    if (begin < blocks) {
        const __mmask8 present = (__mmask8)((1 << (blocks - begin)) - 1);
        add_few(codebook, t, row, begin, present, planes, stride, columns, chains, sum);
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
        __m512i all = _mm512_add_epi32(sum[c][0], sum[c][1]);
        if (chains == 4) all = _mm512_add_epi32(all, _mm512_add_epi32(sum[c][2], sum[c][3]));
        _mm512_storeu_si512(sums[c], all);
    }
}

/* Any number of planes, summed in memory. */
AVX512 INLINE void many_planes(const int codebook, const tables *t, const char *const *row, int64_t blocks,
                               const int8_t *planes, int64_t stride, int columns, int32_t (*sums)[LANES]) {
    for (int c = 0; c < columns; c++) _mm512_storeu_si512(sums[c], _mm512_setzero_si512());
    for (int64_t begin = 0; begin < blocks; begin += ROW_CODES) {
        const int64_t count = blocks - begin < ROW_CODES ? blocks - begin : ROW_CODES;
        __m512i words[4], weights[BLOCK];
        fetch_ahead(code_bytes(codebook), row, blocks, begin);
        gather(codebook, row, begin, (__mmask8)((1 << count) - 1), words);
        for (int k = 0; k < 2; k++) {
            const int8_t *x = planes + begin * BLOCK + 32 * k;
            expand(codebook, t, words, k, weights);
            for (int c = 0; c < columns; c++, x += stride) {
                __m512i even = _mm512_loadu_si512(sums[c]), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int j = 0; j < BLOCK; j += 2) {
                    even = _mm512_dpbusd_epi32(even, weights[j], _mm512_set1_epi32(((const int32_t *)x)[j]));
                    odd = _mm512_dpbusd_epi32(odd, weights[j + 1], _mm512_set1_epi32(((const int32_t *)x)[j + 1]));
                }
                _mm512_storeu_si512(sums[c], _mm512_add_epi32(even, odd));
            }
        }
    }
}

AVX512 INLINE void products(const int codebook, const char *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                            int64_t stride, int columns, int32_t (*sums)[LANES]) {
    const tables t = load_tables(codebook);
    const char *row[LANES];
    for (int r = 0; r < LANES; r++) row[r] = codes + (r < rows ? r : rows - 1) * blocks * code_bytes(codebook);
    switch (columns) {
        case 1: few_planes(codebook, &t, row, blocks, planes, stride, 1, sums); break;
        case 2: few_planes(codebook, &t, row, blocks, planes, stride, 2, sums); break;
        case 3: few_planes(codebook, &t, row, blocks, planes, stride, 3, sums); break;
        case 4: few_planes(codebook, &t, row, blocks, planes, stride, 4, sums); break;
        default: many_planes(codebook, &t, row, blocks, planes, stride, columns, sums);
    }
}

AVX512 HIDDEN void quip_products_avx512(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                        int64_t stride, int columns, int32_t (*sums)[LANES]) {
    if (codebook == QUIP_E8P)
        products(QUIP_E8P, codes, rows, blocks, planes, stride, columns, sums);
    else
        products(QUIP_E8, codes, rows, blocks, planes, stride, columns, sums);
}

/* The four bytes that vpdpbusd multiplies by one lane belong to four codes: within 32 bytes, coordinate j of code c goes
 * from 8 c + j to 4 j + c. */
AVX512 HIDDEN void quip_order_avx512(int8_t *plane, int64_t stride) {
    uint8_t from[64];
    for (int i = 0; i < 64; i++) from[i] = (uint8_t)((i & 32) | (i & 3) << 3 | (i >> 2 & 7));
    const __m512i index = _mm512_loadu_si512(from);
    for (int64_t i = 0; i < stride; i += 64)
        _mm512_storeu_si512(plane + i, _mm512_permutexvar_epi8(index, _mm512_loadu_si512(plane + i)));
}
#endif
