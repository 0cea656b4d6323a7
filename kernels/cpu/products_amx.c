/* Products of decoded rows with bundles, with AMX.
 *
* Tiles are 16 rows of 32 weights of bfloat16 or 64 of int8, and as many entries of a bundle; two of each are multiplied
 * at a time, which gives four tiles of sums. Every thread decodes rows that stay in its own cache while they are
 * multiplied by all bundles. */
#include "bundles.h"

#if defined(QUIP_AMX)
#include <immintrin.h>

#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

/* The configuration for `ldtilecfg`: eight tiles of 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX static void configure(void) {
    _tile_loadconfig(&tiles);
}

AMX static void release(void) {
    _tile_release();
}

/* z[bundle][row][LANES] of 32 rows and two bundles. */
AMX INLINE void multiply(const char *rows, int64_t stride, const uint32_t *x, const uint32_t *other, int64_t words,
                         int32_t *z, int64_t m, const int bytes) {
    const char *more = rows + LANES * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < words; k += TILE_WORDS) {
        _tile_loadd(4, rows + 4 * k, stride);
        _tile_loadd(6, x + k * LANES, 64);
        if (bytes)
            _tile_dpbssd(0, 4, 6);
        else
            _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, other + k * LANES, 64);
        if (bytes)
            _tile_dpbssd(1, 4, 7);
        else
            _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, more + 4 * k, stride);
        if (bytes) {
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, z, 64);
    _tile_stored(1, z + m * LANES, 64);
    _tile_stored(2, z + LANES * LANES, 64);
    _tile_stored(3, z + (m + LANES) * LANES, 64);
}

AMX static void multiply_pairs(const char *rows, int64_t stride, const uint32_t *x, const uint32_t *other, int64_t words,
                               int32_t *z, int64_t m) {
    multiply(rows, stride, x, other, words, z, m, 0);
}

AMX static void multiply_fours(const char *rows, int64_t stride, const uint32_t *x, const uint32_t *other, int64_t words,
                               int32_t *z, int64_t m) {
    multiply(rows, stride, x, other, words, z, m, 1);
}

/* A row's weights times four, in int8; the rest of the last tile may hold anything. */
__attribute__((target("avx512f,avx512bw,avx512vl"))) static void decode_bytes(const int16_t *codes, int64_t blocks,
                                                                              int8_t *to) {
    const __m512i low = _mm512_set1_epi64(255), offset = _mm512_set1_epi8(BYTE_OFFSET);
    for (int64_t k = 0; k < blocks; k += 8) {
        const __mmask8 some = blocks - k < 8 ? (__mmask8)((1 << (blocks - k)) - 1) : 255;
        const __m512i eight = _mm512_cvtepu16_epi64(_mm_maskz_loadu_epi16(some, codes + k));
        const __m512i pattern = _mm512_i64gather_epi64(_mm512_srli_epi64(eight, 8), quip_e8p_pattern, 8);
        const __m512i signs = _mm512_i64gather_epi64(_mm512_and_si512(eight, low), quip_e8p_signs, 8);
        _mm512_storeu_si512(to + BLOCK * k, _mm512_sub_epi8(_mm512_xor_si512(pattern, signs), offset));
    }
}

typedef struct {
    quip_grid grid;
    const uint32_t *x;
    int32_t *z;
    char *memory;
    int64_t m, words, bundles, rows, next;
    int bytes;
} work;

static void multiply_rows(void *context, int64_t first, int64_t last) {
    work *w = context;
    quip_grid grid = w->grid;
    const int64_t stride = 4 * w->words + MARGIN, bundle = (w->words + w->bytes) * LANES;
    char *decoded = w->memory + first * w->rows * stride;
    (void)last;
    grid.out = decoded;
    configure();
    for (int64_t begin; (begin = __atomic_fetch_add(&w->next, w->rows, __ATOMIC_RELAXED)) < w->m;) {
        const int64_t count = w->m - begin < w->rows ? w->m - begin : w->rows;
        grid.origin = begin;
        if (w->bytes)
            for (int64_t r = 0; r < count; r++)
                decode_bytes(grid.codes + (begin + r) * grid.blocks, grid.blocks, (int8_t *)decoded + r * stride);
        else
            quip_decode_rows(&grid, begin, begin + count);
        for (int64_t b = 0; b < w->bundles; b += 2)
            for (int64_t r = 0; r < count; r += 2 * LANES)
                (w->bytes ? multiply_fours : multiply_pairs)(decoded + r * stride, stride, w->x + b * bundle,
                                                             w->x + (b + 1) * bundle, w->words,
                                                             w->z + (b * w->m + begin + r) * LANES, w->m);
    }
    release();
}

HIDDEN void quip_bundle_products(const quip_layer *layer, const uint32_t *x, int bytes, int64_t bundles, void *z,
                                 void *memory, int64_t rows, int threads) {
    const int64_t words = quip_bundle_words(layer->n, bytes);
    work w = {
        .x = x, .z = z, .memory = memory, .m = layer->m, .words = words, .bundles = bundles, .rows = rows, .bytes = bytes};
    w.grid = quip_make_grid(layer->codes, layer->residual, layer->second, (float)layer->residual_scale, layer->n, 0,
                            QUIP_BFLOAT16, QUIP_AVX512);
    w.grid.stride = layer->n + MARGIN / 2;
    quip_parallel(multiply_rows, &w, threads, 1, threads);
}

#endif
