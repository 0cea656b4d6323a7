/* Products of decoded rows with bundles, with AMX.
 *
 * Tiles are 16 rows of 32 weights, and 32 entries of a bundle; two of each are multiplied at a time, which gives four tiles
 * of sums. Every thread decodes rows that stay in a cache of its own while they meet all bundles. */
#include "bundles.h"

#if defined(QUIP_AMX)
#include <immintrin.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))

/* What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX static void configure(void) { _tile_loadconfig(&tiles); }

AMX static void release(void) { _tile_release(); }

/* z[bundle][row][LANES] of 32 rows and two bundles. */
AMX static void multiply(const uint16_t *rows, int64_t n, const uint32_t *x, float *z, int64_t m) {
    const int64_t stride = (n + MARGIN) * 2;
    const uint16_t *more = rows + LANES * (n + MARGIN);
    const uint32_t *other = x + n / 2 * LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < n; k += TILE_ENTRIES) {
        _tile_loadd(4, rows + k, stride);
        _tile_loadd(6, x + k / 2 * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, other + k / 2 * LANES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, more + k, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, z, 64);
    _tile_stored(1, z + m * LANES, 64);
    _tile_stored(2, z + LANES * LANES, 64);
    _tile_stored(3, z + (m + LANES) * LANES, 64);
}

typedef struct {
    quip_grid grid;
    const uint32_t *x;
    float *z;
    uint16_t *memory;
    int64_t m, n, bundles, rows, next;
} work;

static void multiply_rows(void *context, int64_t first, int64_t last) {
    work *w = context;
    quip_grid grid = w->grid;
    uint16_t *decoded = w->memory + first * w->rows * (w->n + MARGIN);
    (void)last;
    grid.out = decoded;
    configure();
    for (int64_t begin; (begin = __atomic_fetch_add(&w->next, w->rows, __ATOMIC_RELAXED)) < w->m;) {
        const int64_t count = w->m - begin < w->rows ? w->m - begin : w->rows;
        grid.origin = begin;
        quip_decode_rows(&grid, begin, begin + count);
        for (int64_t b = 0; b < w->bundles; b += 2)
            for (int64_t r = 0; r < count; r += 2 * LANES)
                multiply(decoded + r * grid.stride, w->n, w->x + b * w->n / 2 * LANES,
                         w->z + (b * w->m + begin + r) * LANES, w->m);
    }
    release();
}

HIDDEN void quip_bundle_products(const quip_layer *layer, const uint32_t *x, int64_t bundles, float *z, void *memory,
                                 int64_t rows, int threads) {
    work w = {.x = x, .z = z, .memory = memory, .m = layer->m, .n = layer->n, .bundles = bundles, .rows = rows};
    w.grid = quip_make_grid(layer->codes, layer->residual, layer->second, (float)layer->residual_scale, layer->n, 0,
                            QUIP_BFLOAT16, QUIP_AVX512);
    w.grid.stride = layer->n + MARGIN;
    quip_parallel(multiply_rows, &w, threads, 1, threads);
}

#endif
