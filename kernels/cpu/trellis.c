/* Linear layers with trellis-coded weights, and the weights themselves. */
#include "trellis.h"

#include <stdlib.h>
#include <string.h>

#define SMALL_TABLE 10 /* index bits of a table that stays in the first-level cache as float32 */
#define TOGETHER 8 /* tiles of one row that are decoded before they are converted, or multiplied by several vectors */

typedef struct {
    const quip_trellis *w;
    trellis_kernels kernels;
    trellis_plan plan;
    int32_t source[TILE_WEIGHTS]; /* place in a tile's sequence of the weight in row i / 16 and column i % 16 */
    const float *views; /* [n / 16][count][32], the factors of 32 consecutive weights of the sequence */
    float *z;           /* [count][m] */
    void *out;
    trellis_taker take;
    void *context;
    int64_t count;
    int type, failed;
} work;

/* Row and column in its tile of weight q of the tile's sequence. */
static int row_of(int order, int q) {
    if (order == TRELLIS_ROWS) return q >> 4;
    return (q >> 5) | (order == TRELLIS_QTIP ? q >> 1 & 1 : q >> 2 & 1) << 3;
}

static int column_of(int order, int q) {
    if (order == TRELLIS_ROWS) return q & 15;
    return (q & 1) | (q >> 3 & 3) << 1 | (order == TRELLIS_QTIP ? q >> 2 & 1 : q >> 1 & 1) << 3;
}

static void find_places(int order, int32_t *source) {
    for (int q = 0; q < TILE_WEIGHTS; q++) source[row_of(order, q) * TILE + column_of(order, q)] = q;
}

static trellis_kernels kernels_of(int level, int code) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* Processors with the other instructions of that level have IFMA too; any other uses AVX2. */
    if (level == QUIP_AVX512 && __builtin_cpu_supports("avx512ifma")) {
        trellis_kernels kernels = quip_trellis_avx512;
#if defined(TRELLIS_FP16)
        if (__builtin_cpu_supports("avx512fp16")) quip_trellis_use_fp16(&kernels, code);
#endif
        return kernels;
    }
    if (level >= QUIP_AVX2 && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return quip_trellis_avx2;
#elif defined(QUIP_ARM)
    if (level >= QUIP_NEON) return *quip_arm_trellis(level);
#endif
    (void)level, (void)code;
    return quip_trellis_plain;
}

/* The plan with its table. Code hyb has the table twice, the second time with the sign for bit 15 of h. Returns 0, or -2
 * without enough memory. */
static int make_plan(const quip_trellis *w, const trellis_kernels *kernels, trellis_plan *plan) {
    memset(plan, 0, sizeof *plan);
    plan->code = w->code;
    plan->pair_bits = w->pair_bits * w->step;
    kernels->prepare(plan);
    if (!w->table) return 0;
    const int64_t rows = (int64_t)1 << w->table_bits, size = rows * w->step;
    const int both = w->code == TRELLIS_HYB;
    float *values = quip_get_memory((1 + both) * size * (int64_t)sizeof *values);
    uint16_t *halves = quip_get_memory((1 + both) * size * (int64_t)sizeof *halves);
    float *back = quip_get_memory(size * (int64_t)sizeof *back);
    plan->values = values;
    if (!values || !halves || !back) {
        free(values);
        free(halves);
        free(back);
        return -2;
    }
    plan->bits = w->table_bits + both;
    plan->multiplied = w->code != TRELLIS_LUT;
    plan->kind = w->step == 1 ? TABLE_SINGLE : TABLE_PAIRS;
    quip_load(w->table, w->table_type, 0, values, size);
    if (both)
        for (int64_t i = 0; i < size; i++) values[size + i] = i % w->step ? values[i] : -values[i];
    if (w->step == 2 && plan->bits > SMALL_TABLE) {
        /* If 16 bits hold the numbers, two in one word take half of the memory, but must be converted. */
        quip_store(values, halves, QUIP_FLOAT16, 0, (1 + both) * size);
        quip_load(halves, QUIP_FLOAT16, 0, back, size);
        if (!memcmp(values, back, (size_t)size * sizeof *back)) {
            for (int64_t i = 0; i < (1 + both) * rows; i++) {
                const uint32_t word = halves[2 * i] | (uint32_t)halves[2 * i + 1] << 16;
                memcpy(values + i, &word, sizeof word);
            }
            plan->kind = TABLE_HALVES;
        }
    }
    free(halves);
    free(back);
    return 0;
}

static int64_t words_of_tile(const quip_trellis *w) {
    return (int64_t)TILE / 2 * w->pair_bits;
}

/* Codes of row number r of tiles. */
static const int16_t *row_of_codes(const quip_trellis *w, int64_t r) {
    const char *codes = w->layer.codes;
    codes += w->form == TRELLIS_STORED ? r * quip_code_bytes_of_row(w) : r * quip_record_size(w) + RECORD_HEAD;
    return (const int16_t *)codes;
}

/* Tile number t of row r; a copy if it is so near to the end of the codes that kernels would read beyond them. In a record
 * the bytes follow. */
static const int16_t *tile_with_margin(const quip_trellis *w, int64_t r, int64_t t, int16_t *copy) {
    const int64_t words = words_of_tile(w), tiles = w->layer.n / TILE, last = w->layer.m / TILE * tiles - 1;
    const int16_t *tile = row_of_codes(w, r) + t * words;
    if (w->form != TRELLIS_STORED || (last - r * tiles - t) * words * 2 >= MARGIN) return tile;
    memcpy(copy, tile, (size_t)words * sizeof *tile);
    return copy;
}

/* Rows [first, last) of tiles times all vectors. */
static void multiply_rows(void *context, int64_t first, int64_t last) {
    work *j = context;
    const quip_trellis *w = j->w;
    const int64_t tiles = w->layer.n / TILE, stride = 2 * TILE * j->count;
    int16_t copy[TILE * MOST_BITS + MARGIN] = {0};
    float weights[TOGETHER][TILE_WEIGHTS] __attribute__((aligned(64)));
    const int64_t bytes = j->count * TILE_WEIGHTS * (int64_t)sizeof(float);
    float *sums = quip_get_memory(bytes);
    if (!sums) {
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    const float unit = w->code <= TRELLIS_2MAD ? 1 / TRELLIS_MAD : 1;
    for (int64_t r = first; r < last; r++) {
        memset(sums, 0, (size_t)bytes);
        if (j->count == 1) {
            int64_t whole = tiles;
            while (whole && tile_with_margin(w, r, whole - 1, copy) == copy) whole--;
            j->kernels.products(&j->plan, row_of_codes(w, r), whole, j->views, sums);
            for (int64_t t = whole; t < tiles; t++)
                j->kernels.products(&j->plan, tile_with_margin(w, r, t, copy), 1, j->views + stride * t, sums);
        } else {
            for (int64_t begin = 0; begin < tiles; begin += TOGETHER) {
                const int64_t count = tiles - begin < TOGETHER ? tiles - begin : TOGETHER;
                for (int64_t t = 0; t < count; t++)
                    j->kernels.decode(&j->plan, tile_with_margin(w, r, begin + t, copy), weights[t]);
                for (int64_t v = 0; v < j->count; v++)
                    j->kernels.multiply(weights[0], count, j->views + stride * begin + 2 * TILE * v, stride,
                                        sums + v * TILE_WEIGHTS);
            }
        }
        for (int64_t v = 0; v < j->count; v++) {
            float *z = j->z + v * w->layer.m + r * TILE;
            for (int i = 0; i < TILE; i++) {
                double total = 0;
                for (int c = 0; c < TILE; c++) total += sums[v * TILE_WEIGHTS + j->source[TILE * i + c]];
                z[i] = (float)(total * unit);
            }
        }
    }
    free(sums);
}

/* `count` tiles of row r from number `begin` on, decoded: rows[stride * i + j]. */
static void decode_tiles(const work *j, int64_t r, int64_t begin, int64_t count, float *rows, int64_t stride) {
    int16_t copy[TILE * MOST_BITS + MARGIN] = {0};
    float weights[TILE_WEIGHTS] __attribute__((aligned(64)));
    for (int64_t t = 0; t < count; t++) {
        j->kernels.decode(&j->plan, tile_with_margin(j->w, r, begin + t, copy), weights);
        if (j->w->code <= TRELLIS_2MAD)
            for (int i = 0; i < TILE_WEIGHTS; i++) weights[i] /= TRELLIS_MAD;
        j->kernels.arrange(weights, j->source, rows + t * TILE, stride);
    }
}

/* Rows [first, last) of tiles, decoded. */
static void decode_rows(void *context, int64_t first, int64_t last) {
    work *j = context;
    const int64_t n = j->w->layer.n, tiles = n / TILE;
    float rows[TILE][TOGETHER * TILE] __attribute__((aligned(64)));
    for (int64_t r = first; r < last; r++)
        for (int64_t begin = 0; begin < tiles; begin += TOGETHER) {
            const int64_t count = tiles - begin < TOGETHER ? tiles - begin : TOGETHER;
            decode_tiles(j, r, begin, count, rows[0], TOGETHER * TILE);
            for (int i = 0; i < TILE; i++)
                quip_store(rows[i], j->out, j->type, (r * TILE + i) * n + begin * TILE, count * TILE);
        }
}

/* Rows [first, last) of tiles, decoded and given away. */
static void give_rows(void *context, int64_t first, int64_t last) {
    work *j = context;
    const int64_t n = j->w->layer.n;
    float *rows = quip_get_memory(TILE * n * (int64_t)sizeof *rows);
    if (!rows) {
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t r = first; r < last; r++) {
        decode_tiles(j, r, 0, n / TILE, rows, n);
        j->take(j->context, r, rows);
    }
    free(rows);
}

HIDDEN int quip_trellis_each_row(const quip_trellis *w, trellis_taker take, void *context, int level, int threads) {
    work j = {.w = w, .kernels = kernels_of(level, w->code), .take = take, .context = context};
    if (make_plan(w, &j.kernels, &j.plan)) return -2;
    find_places(w->order, j.source);
    quip_parallel(give_rows, &j, w->layer.m / TILE, 1, threads);
    free(j.plan.values);
    return j.failed ? -2 : 0;
}

HIDDEN int quip_trellis_is_sound(const quip_trellis *w) {
    const int tabulated = w->code >= TRELLIS_HYB;
    const int64_t m = w->layer.m, n = w->layer.n;
    return w->code >= TRELLIS_1MAD && w->code <= TRELLIS_LUT && w->pair_bits >= 2 && w->pair_bits <= 2 * MOST_BITS &&
           (w->pair_bits % 2 == 0 || (w->code == TRELLIS_MUL1 && w->pair_bits < 8)) && m >= 0 && n > 0 && m % TILE == 0 &&
           n % TILE == 0 && w->order >= TRELLIS_ROWS && w->order <= TRELLIS_EXL3 && !!w->table == tabulated &&
           (w->step == 1 || (w->step == 2 && tabulated)) &&
           (!tabulated || (w->table_bits >= 1 && w->table_bits + (w->code == TRELLIS_HYB) <= 16)) &&
           (w->code != TRELLIS_LUT || w->table_bits == 16) && (!w->layer.in || w->layer.in->size == n) &&
           (!w->layer.out || w->layer.out->size == m) && w->layer.second == QUIP_NO_STAGE && w->form >= TRELLIS_STORED &&
           w->form <= TRELLIS_BYTES;
}

/* z[count][m] of x[count][n]. Returns as quip_trellis_linear. */
static int multiply(const quip_trellis *w, const float *x, float *z, int64_t count, int level, int threads) {
    work j = {.w = w, .kernels = kernels_of(level, w->code), .z = z, .count = count};
    if (make_plan(w, &j.kernels, &j.plan)) return -2;
    find_places(w->order, j.source);
    const int64_t n = w->layer.n, tiles = n / TILE;
    float *const views = quip_get_memory(2 * count * n * (int64_t)sizeof *views);
    if (views) {
        int column[2 * TILE];
        for (int q = 0; q < 2 * TILE; q++) column[q] = column_of(w->order, q);
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t v = 0; v < count; v++)
                for (int q = 0; q < 2 * TILE; q++) views[(t * count + v) * 2 * TILE + q] = x[v * n + t * TILE + column[q]];
        j.views = views;
        quip_parallel(multiply_rows, &j, w->layer.m / TILE, (1 << 15) / (n * count) + 1, threads);
        free(views);
    } else
        j.failed = 1;
    free(j.plan.values);
    return j.failed ? -2 : 0;
}

/* y[count][m] of x[count][n], vectors of x `x_stride` apart. Returns 0, -1 for arguments out of range, -2 without
 * enough memory. level: at most quip_cpu_level(). */
EXPORT int quip_trellis_linear(const quip_trellis *w, const void *x, void *y, int64_t count, int64_t x_stride, int x_type,
                               int y_type, int level, int threads) {
    if (!quip_trellis_is_sound(w) || count < 0) return -1;
    if (count == 0 || w->layer.m == 0) return 0;
    const quip_layer *layer = &w->layer;
    float *t = quip_get_memory(count * (layer->n + layer->m) * (int64_t)sizeof *t), *z = t + count * layer->n;
    if (!t) return -2;
    const quip_transform identity_in = {.size = layer->n, .power = 1}, identity_out = {.size = layer->m, .power = 1};
    quip_transform_call in = {.x = x,
                              .y = t,
                              .before = layer->su,
                              .q = layer->in ? layer->in : &identity_in,
                              .count = count,
                              .x_stride = x_stride,
                              .x_type = x_type,
                              .y_type = QUIP_FLOAT32,
                              .before_type = layer->su_type,
                              .transpose = 1,
                              .threads = threads};
    quip_transform_call out = {.x = z,
                               .y = y,
                               .after = layer->sv,
                               .bias = layer->bias,
                               .q = layer->out ? layer->out : &identity_out,
                               .count = count,
                               .x_stride = layer->m,
                               .x_type = QUIP_FLOAT32,
                               .y_type = y_type,
                               .after_type = layer->sv_type,
                               .bias_type = layer->bias_type,
                               .threads = threads};
    int failed = quip_transform_vectors(&in);
    if (!failed)
        failed = (w->form == TRELLIS_BYTES ? quip_trellis_multiply_bytes : multiply)(w, t, z, count, level, threads);
    if (!failed) failed = quip_transform_vectors(&out);
    free(t);
    return failed;
}

/* out[m][n] of `type`. Returns as quip_trellis_linear. */
EXPORT int quip_trellis_decode(const quip_trellis *w, void *out, int type, int level, int threads) {
    if (!quip_trellis_is_sound(w)) return -1;
    work j = {.w = w, .kernels = kernels_of(level, w->code), .out = out, .type = type};
    if (make_plan(w, &j.kernels, &j.plan)) return -2;
    find_places(w->order, j.source);
    quip_parallel(decode_rows, &j, w->layer.m / TILE, (1 << 14) / w->layer.n + 1, threads);
    free(j.plan.values);
    return 0;
}
