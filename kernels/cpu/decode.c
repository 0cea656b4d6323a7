/* Weights of a grid of codes: of E8P in float32, bfloat16 or float16 (all exact), and of two stages. */
#include <string.h>

#include "common.h"

/* The 16 bits of the weight of a byte 4 w + 31; the bytes are even, from 20 to 42. */
static uint16_t sixteen_bits(int byte, int type) {
    const float weight = (float)(byte - BYTE_OFFSET) / 4;
    uint16_t bits;
    quip_store(&weight, &bits, type == QUIP_FLOAT16 ? QUIP_FLOAT16 : QUIP_BFLOAT16, 0, 1);
    return bits;
}

INLINE uint64_t eight_bytes(int16_t code) {
    return quip_e8p_pattern[(uint16_t)code >> 8] ^ quip_e8p_signs[code & 255];
}

/* `count` bytes of weights of one row, from code k on; columns beyond the last are left out. */
static void write_bytes(const quip_grid *g, const uint8_t *bytes, int count, int64_t k, int64_t row) {
    const int64_t begin = (row - g->origin) * g->stride + BLOCK * k, left = g->columns - BLOCK * k;
    for (int i = 0; i < count && i < left; i++) {
        const uint16_t value = g->values[bytes[i] >> 1 & 31];
        if (g->type == QUIP_FLOAT32) {
            const uint32_t bits = (uint32_t)value << 16;
            memcpy((float *)g->out + begin + i, &bits, sizeof bits);
        } else
            ((uint16_t *)g->out)[begin + i] = value;
    }
}

/* Codes [first, blocks) of one row. */
static void decode_plain(const quip_grid *g, const int16_t *codes, int64_t first, int64_t row) {
    for (int64_t k = first; k < g->blocks; k++) {
        const uint64_t eight = eight_bytes(codes[k]);
        uint8_t bytes[BLOCK];
        memcpy(bytes, &eight, sizeof bytes);
        write_bytes(g, bytes, BLOCK, k, row);
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

typedef struct {
    __m256i low, high; /* either byte of the 16 bits of a weight */
} byte_tables;

AVX2 static byte_tables tables_of(const quip_grid *g) {
    uint8_t low[16], high[16];
    for (int i = 0; i < LANES; i++) {
        low[i] = (uint8_t)g->values[i];
        high[i] = (uint8_t)(g->values[i] >> 8);
    }
    return (byte_tables){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                         _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
}

/* The bytes of four codes of one row, from code k on, with the two middle ones exchanged: unpacking works in halves of a
 * register. */
AVX2 INLINE void write_four(const quip_grid *g, const byte_tables *tables, __m256i bytes, int64_t k, int64_t row) {
    const int64_t at = (row - g->origin) * g->stride + BLOCK * k;
    const __m256i zero = _mm256_setzero_si256();
    const __m256i index = _mm256_and_si256(_mm256_srli_epi16(bytes, 1), _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(tables->low, index), high = _mm256_shuffle_epi8(tables->high, index);
    const __m256i half[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    if (g->type == QUIP_FLOAT32) {
        float *out = (float *)g->out + at;
        for (int i = 0; i < 2; i++) {
            const __m256i a = _mm256_unpacklo_epi16(zero, half[i]), b = _mm256_unpackhi_epi16(zero, half[i]);
            _mm256_storeu_si256((__m256i *)(out + 16 * i), _mm256_permute2x128_si256(a, b, 0x20));
            _mm256_storeu_si256((__m256i *)(out + 16 * i + 8), _mm256_permute2x128_si256(a, b, 0x31));
        }
    } else {
        uint16_t *out = (uint16_t *)g->out + at;
        _mm256_storeu_si256((__m256i *)out, half[0]);
        _mm256_storeu_si256((__m256i *)(out + 16), half[1]);
    }
}

/* Whole groups of four codes of one row; returns how many codes were decoded. */
AVX2 static int64_t decode_avx2(const quip_grid *g, const int16_t *codes, int64_t row) {
    const byte_tables tables = tables_of(g);
    int64_t k = 0;
    for (; BLOCK * (k + 4) <= g->columns; k += 4)
        write_four(g, &tables,
                   _mm256_set_epi64x((long long)eight_bytes(codes[k + 3]), (long long)eight_bytes(codes[k + 1]),
                                     (long long)eight_bytes(codes[k + 2]), (long long)eight_bytes(codes[k])),
                   k, row);
    return k;
}

/* The same for the bytes of `count` codes, from code `first` on. */
AVX2 static int write_bytes_avx2(const quip_grid *g, const uint8_t *bytes, int count, int64_t first, int64_t row) {
    const byte_tables tables = tables_of(g);
    int k = 0;
    for (; k + 4 <= count && BLOCK * (first + k + 4) <= g->columns; k += 4)
        write_four(g, &tables, _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(bytes + BLOCK * k)), 0xd8),
                   first + k, row);
    return k;
}

/* The same for whole groups of eight codes, to types of 16 bits. */
__attribute__((target("avx512f,avx512bw"))) static int64_t decode_avx512(const quip_grid *g, const int16_t *codes,
                                                                         int64_t row) {
    const __m512i values = _mm512_loadu_si512(g->values), byte = _mm512_set1_epi64(255);
    uint16_t *out = (uint16_t *)g->out + (row - g->origin) * g->stride;
    int64_t k = 0;
    for (; BLOCK * (k + 8) <= g->columns; k += 8) {
        const __m512i eight = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)(codes + k)));
        const __m512i pattern = _mm512_i64gather_epi64(_mm512_srli_epi64(eight, 8), quip_e8p_pattern, 8);
        const __m512i signs = _mm512_i64gather_epi64(_mm512_and_si512(eight, byte), quip_e8p_signs, 8);
        const __m512i index = _mm512_srli_epi16(_mm512_xor_si512(pattern, signs), 1); /* bytes are even */
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(index));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(index, 1));
        _mm512_storeu_si512(out + BLOCK * k, _mm512_permutexvar_epi16(low, values));
        _mm512_storeu_si512(out + BLOCK * (k + 4), _mm512_permutexvar_epi16(high, values));
    }
    return k;
}
#endif

#define STRETCH 256 /* codes decoded at a time */

static void decode_nibbles(const quip_grid *g, int64_t first, int64_t last) {
    uint8_t bytes[BLOCK * STRETCH];
    for (int64_t row = first; row < last; row++)
        for (int64_t k = 0; k < g->blocks; k += STRETCH) {
            const int count = g->blocks - k < STRETCH ? (int)(g->blocks - k) : STRETCH;
            quip_nibble_bytes(QUIP_E8P, g->codes, g->blocks, row, k, count, bytes);
            int done = 0;
#if defined(__x86_64__)
            if (g->level >= QUIP_AVX2) done = write_bytes_avx2(g, bytes, count, k, row);
#endif
            write_bytes(g, bytes + BLOCK * done, BLOCK * (count - done), k + done, row);
        }
}

static void decode_one(const quip_grid *g, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const int16_t *codes = (const int16_t *)g->codes + row * g->blocks;
        int64_t done = 0;
#if defined(__x86_64__)
        if (g->level == QUIP_AVX512 && g->type != QUIP_FLOAT32)
            done = decode_avx512(g, codes, row);
        else if (g->level >= QUIP_AVX2)
            done = decode_avx2(g, codes, row);
#elif defined(QUIP_ARM)
        if (g->level >= QUIP_NEON) done = quip_decode_neon(g, codes, row);
#endif
        decode_plain(g, codes, done, row);
    }
}

/* The bytes of `count` codes of a row of one stage, from code k on. */
static void read_bytes(const quip_grid *g, int codebook, const void *codes, int in_nibbles, int64_t row, int64_t k,
                       int count, uint8_t *bytes) {
    if (in_nibbles)
        quip_nibble_bytes(codebook, codes, g->blocks, row, k, count, bytes);
    else
        quip_expand(codebook, codes, row * g->blocks + k, count, bytes);
}

FOR_EACH_CPU static void decode_two(const quip_grid *g, int64_t first, int64_t last) {
    const float quarter = g->scale / 4; /* of the scale, exactly */
    uint8_t base[BLOCK * STRETCH], rest[BLOCK * STRETCH];
    float weights[BLOCK * STRETCH];
    for (int64_t row = first; row < last; row++)
        for (int64_t k = 0; k < g->blocks; k += STRETCH) {
            const int count = g->blocks - k < STRETCH ? (int)(g->blocks - k) : STRETCH;
            const int64_t left = g->columns - BLOCK * k;
            read_bytes(g, QUIP_E8P, g->codes, g->nibbles & QUIP_FIRST, row, k, count, base);
            read_bytes(g, g->second, g->residual, g->nibbles & QUIP_SECOND, row, k, count, rest);
            for (int i = 0; i < BLOCK * count; i++)
                weights[i] = 0.25f * (float)(base[i] - BYTE_OFFSET) + quarter * (float)(rest[i] - BYTE_OFFSET);
            quip_store(weights, g->out, g->type, (row - g->origin) * g->stride + BLOCK * k,
                       left < BLOCK * count ? left : BLOCK * count);
        }
}

HIDDEN void quip_decode_rows(void *grid, int64_t first, int64_t last) {
    const quip_grid *g = grid;
    if (g->second == QUIP_NO_STAGE && g->nibbles)
        decode_nibbles(g, first, last);
    else if (g->second == QUIP_NO_STAGE)
        decode_one(g, first, last);
    else
        decode_two(g, first, last);
}

HIDDEN quip_grid quip_make_grid(const void *codes, const void *residual, int second, float scale, int64_t columns,
                                void *out, int type, int level) {
    quip_grid g = {codes, residual, (columns + BLOCK - 1) / BLOCK, columns, columns, 0, second, type, level, 0, scale,
                   out,   {0}};
    quip_e8p_make_tables();
    quip_e8_make_tables();
    for (int byte = 20; byte <= 42; byte += 2) g.values[byte >> 1] = g.values[byte >> 1 & 15] = sixteen_bits(byte, type);
    return g;
}

/* out[rows][columns] of `type` from codes[rows][ceil(columns / 8)]. level: at most quip_cpu_level(). With a second
 * stage, QUIP_E8 or QUIP_E8P, the sum of E8P and `scale` times the second stage's points, rounded to `type`.
 * nibbles: the stages that are in nibbles, as of quip_layer; rows are then a multiple of 16. */
EXPORT void quip_decode(const void *codes, const void *residual, int second, float scale, int64_t rows, int64_t columns,
                        void *out, int type, int nibbles, int level, int threads) {
    quip_grid g = quip_make_grid(codes, residual, second, scale, columns, out, type, level);
    g.nibbles = nibbles;
    quip_parallel(quip_decode_rows, &g, rows, 65536 / (columns + 1) + 1, threads);
}
