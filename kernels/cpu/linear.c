/* A quantized linear layer in one call:  y = sv * Q_out( W Q_in^T( su * x ) ) + bias.
 *
 * Products with the codes are exact sums of integers. The transformed vector is divided by a scale of its own, rounded
 * to an integer, and written in base 256 with digits from -128 to 127: one plane of int8 per digit. Three planes keep
 * 23 bits and a sign, the accuracy of float32 for the largest entries; two keep 15 bits, one keeps 7. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

#define MOST_PLANES 3
#define MOST_COLUMNS (1 << 18) /* a sum of this many products of a byte with a digit fits into 32 bits */
#define PAD 256

typedef struct {
    const quip_layer *layer;
    const void *x;
    void *y;
    int64_t count, x_stride; /* number of vectors; distance from one to the next */
    int x_type, y_type, count_planes, level;
    quip_products products;
    int64_t stride; /* of planes */
    int8_t *planes; /* [count][planes][stride] */
    double *scale;  /* [count], of a digit's unit */
    double *total;  /* [count], the sum of a vector's integers */
    float *z;       /* [count][m], between the transforms */
    float *su, *sv, *bias;
    int failed;
} linear;

/* The vector as digits in base 256, and its sum. Values that are not finite make the scale not a number. */
FOR_EACH_CPU static void make_planes(const float *restrict t, int64_t n, int count, int8_t *restrict planes, int64_t stride,
                                     double *scale, double *sum) {
    /* The largest number of one, two, three digits; for three a little less, because float32 may round up to more. */
    static const float largest[MOST_PLANES] = {127, 127 * 256 + 127, 127 * 65536 + 127 * 256};
    float lanes[LANES] = {0}, most = 0;
    int32_t bad[LANES] = {0}, any_bad = 0;
    double sums[LANES] = {0}, total = 0;
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) EACH_LANE {
            const float size = fabsf(t[i + l]);
            lanes[l] = size > lanes[l] ? size : lanes[l];
            bad[l] |= !(size <= FLT_MAX);
        }
    for (int l = 0; l < LANES; l++) {
        most = lanes[l] > most ? lanes[l] : most;
        any_bad |= bad[l];
    }
    for (int64_t i = whole; i < n; i++) {
        most = fabsf(t[i]) > most ? fabsf(t[i]) : most;
        any_bad |= !(fabsf(t[i]) <= FLT_MAX);
    }
    if (any_bad || most == 0) {
        memset(planes, 0, (size_t)(count * stride));
        *scale = any_bad ? NAN : 0;
        *sum = 0;
        return;
    }
    most = most < 1e-30f ? 1e-30f : most; /* the inverse must be finite */
    const float inverse = largest[count - 1] / most;
    for (int c = 0; c < count; c++) memset(planes + c * stride + whole, 0, (size_t)(stride - whole));
    for (int64_t i = 0; i < whole; i += LANES) {
        int32_t rest[LANES];
        EACH_LANE {
            const float value = t[i + l] * inverse;
            rest[l] = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
            sums[l] += rest[l];
        }
        for (int c = 0; c < count; c++) EACH_LANE {
                const int8_t digit = (int8_t)rest[l];
                planes[c * stride + i + l] = digit;
                rest[l] = (rest[l] - digit) >> 8;
            }
    }
    for (int64_t i = whole; i < n; i++) {
        const float value = t[i] * inverse;
        int32_t rest = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
        total += rest;
        for (int c = 0; c < count; c++) {
            const int8_t digit = (int8_t)rest;
            planes[c * stride + i] = digit;
            rest = (rest - digit) >> 8;
        }
    }
    for (int l = 0; l < LANES; l++) total += sums[l];
    *scale = (double)most / largest[count - 1];
    *sum = total;
}

/* Vectors [first, last): su * x, the transposed input transform, digits. */
static void read_vectors(void *context, int64_t first, int64_t last) {
    linear *work = context;
    const quip_layer *layer = work->layer;
    const int64_t n = layer->n;
    float *memory = quip_get_memory(2 * n * (int64_t)sizeof *memory);
    if (!memory) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t v = first; v < last; v++) {
        float *t = memory;
        quip_load(work->x, work->x_type, v * work->x_stride, t, n);
        if (work->su) quip_scale_vector(t, work->su, n);
        if (layer->in) t = quip_apply(layer->in, 1, t, memory + n);
        int8_t *planes = work->planes + v * work->count_planes * work->stride;
        make_planes(t, n, work->count_planes, planes, work->stride, work->scale + v, work->total + v);
#if defined(__x86_64__)
        if (work->level == QUIP_AVX512) quip_order_avx512(planes, work->count_planes * work->stride);
#endif
    }
    free(memory);
}

/* The sums of sixteen rows, from the sums of their digits, without the contribution of the bytes' offset. */
INLINE void sum_digits(const int32_t (*digits)[LANES], int planes, double offset, double *sum) {
    EACH_LANE sum[l] = 0;
    for (int c = planes - 1; c >= 0; c--) EACH_LANE sum[l] = 256 * sum[l] + digits[c][l];
    EACH_LANE sum[l] -= offset;
}

/* Sums of a tile of rows of one stage: its products, and for each of a vector's integers so much more than four times the
 * weight. */
INLINE double multiply_stage(const linear *work, int codebook, const void *codes, int in_nibbles, int64_t tile, int columns,
                             int32_t (*sums)[LANES]) {
    const quip_layer *layer = work->layer;
    const int64_t blocks = (layer->n + BLOCK - 1) / BLOCK, row = tile * LANES;
    const int rows = layer->m - row < LANES ? (int)(layer->m - row) : LANES, bytes = codebook == QUIP_E8P ? 2 : 1;
    if (in_nibbles) {
        quip_products_nibbles((const uint8_t *)codes + row * blocks * BLOCK / 2, blocks, work->planes, work->stride,
                              columns, sums, work->level);
        return BYTE_OFFSET - quip_nibble_least(codebook);
    }
    work->products(codebook, (const char *)codes + row * blocks * bytes, rows, blocks, work->planes, work->stride, columns,
                   sums);
    return BYTE_OFFSET;
}

/* Tiles [first, last) of sixteen rows of codes, for all vectors. */
FOR_EACH_CPU static void multiply_tiles(void *context, int64_t first, int64_t last) {
    linear *work = context;
    const quip_layer *layer = work->layer;
    const int64_t m = layer->m;
    const int columns = (int)work->count * work->count_planes;
    const int stages = layer->second == QUIP_NO_STAGE ? 1 : 2;
    int32_t on_stack[2 * 8][LANES] __attribute__((aligned(64)));
    int32_t (*sums)[LANES] = columns <= 8 ? on_stack : quip_get_memory(stages * columns * (int64_t)sizeof *sums);
    int32_t (*residual)[LANES] = sums + columns;
    if (!sums) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * LANES;
        const int rows = m - row < LANES ? (int)(m - row) : LANES;
        const double more = multiply_stage(work, QUIP_E8P, layer->codes, layer->nibbles & QUIP_FIRST, tile, columns, sums);
        const double more_of_second = stages == 1 ? 0
                                                  : multiply_stage(work, layer->second, layer->residual,
                                                                   layer->nibbles & QUIP_SECOND, tile, columns, residual);
        for (int64_t v = 0; v < work->count; v++) {
            const int64_t at = v * work->count_planes;
            const double unit = work->scale[v] / 4, total = work->total[v];
            double sum[LANES];
            float z[LANES];
            sum_digits((const int32_t (*)[LANES])sums + at, work->count_planes, more * total, sum);
            if (stages == 2) {
                double rest[LANES];
                sum_digits((const int32_t (*)[LANES])residual + at, work->count_planes, more_of_second * total, rest);
                EACH_LANE sum[l] += layer->residual_scale * rest[l];
            }
            EACH_LANE z[l] = (float)(sum[l] * unit);
            memcpy(work->z + v * m + row, z, (size_t)rows * sizeof *z);
        }
    }
    if (sums != on_stack) free(sums);
}

/* Vectors [first, last): the output transform, sv and bias. */
static void write_vectors(void *context, int64_t first, int64_t last) {
    linear *work = context;
    const quip_layer *layer = work->layer;
    const int64_t m = layer->m;
    float *scratch = quip_get_memory(m * (int64_t)sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t v = first; v < last; v++) {
        float *t = work->z + v * m;
        if (layer->out) t = quip_apply(layer->out, 0, t, scratch);
        if (work->sv) quip_scale_vector(t, work->sv, m);
        if (work->bias) quip_add_vector(t, work->bias, m);
        quip_store(t, work->y, work->y_type, v * m, m);
    }
    free(scratch);
}

static quip_products products_of(int level) {
#if defined(__x86_64__)
    if (level == QUIP_AVX512) return quip_products_avx512;
    if (level == QUIP_AVX2) return quip_products_avx2;
#elif defined(QUIP_ARM)
    if (level >= QUIP_NEON) return quip_arm_products(level);
#endif
    (void)level;
    return quip_products_plain;
}

/* The best instructions that this processor has for the products: 0 plain C; 1 AVX2, 2 AVX-512 (VBMI, VNNI, GFNI); on ARM
 * 1 NEON, 2 dot products. */
EXPORT int quip_cpu_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni"))
        return QUIP_AVX512;
    if (__builtin_cpu_supports("avx2")) return QUIP_AVX2;
#elif defined(QUIP_ARM)
    return quip_arm_level();
#endif
    return QUIP_PLAIN;
}

/* y[count][m] of x[count][n], vectors of x `x_stride` apart. Returns 0, -1 for arguments out of range, -2 without
 * enough memory. planes: int8 digits of an activation; level: at most quip_cpu_level(). */
EXPORT int quip_linear(const quip_layer *layer, const void *x, void *y, int64_t count, int64_t x_stride, int x_type,
                       int y_type, int planes, int level, int threads) {
    const int64_t n = layer->n, m = layer->m;
    if (n < 1 || n > MOST_COLUMNS || m < 1 || count < 0 || planes < 1 || planes > MOST_PLANES) return -1;
    if (count > INT32_MAX / MOST_PLANES || (layer->in && layer->in->size != n) || (layer->out && layer->out->size != m))
        return -1;
    if (layer->second < QUIP_NO_STAGE || layer->second > QUIP_E8P) return -1;
    if (layer->nibbles && m % LANES) return -1;
    if (count == 0) return 0;
#if defined(__x86_64__)
    if (layer->nibbles && level > QUIP_AVX2) level = QUIP_AVX2; /* the products with AVX-512 want planes in another order */
#endif
    quip_e8p_make_tables();
    quip_e8_make_tables();

    linear work = {.layer = layer,
                   .x = x,
                   .y = y,
                   .count = count,
                   .x_stride = x_stride,
                   .x_type = x_type,
                   .y_type = y_type,
                   .count_planes = planes,
                   .level = level,
                   .products = products_of(level),
                   .stride = (n + PAD - 1) / PAD * PAD};
    /* One allocation, its parts in multiples of 64 bytes. */
    const int64_t part[] = {
        count * planes * work.stride,
        count * (int64_t)sizeof(double),
        count * (int64_t)sizeof(double),
        count * m * (int64_t)sizeof(float),
        n * (int64_t)sizeof(float),
        m * (int64_t)sizeof(float),
        layer->bias ? m * (int64_t)sizeof(float) : 0,
    };
    int64_t begin[8] = {0};
    for (int i = 0; i < 7; i++) begin[i + 1] = begin[i] + (part[i] + 63) / 64 * 64;
    char *memory = quip_get_memory(begin[7]);
    if (!memory) return -2;
    work.planes = (int8_t *)memory;
    work.scale = (double *)(memory + begin[1]);
    work.total = (double *)(memory + begin[2]);
    work.z = (float *)(memory + begin[3]);
    if (layer->su) {
        work.su = (float *)(memory + begin[4]);
        quip_load(layer->su, layer->su_type, 0, work.su, n);
    }
    if (layer->sv) {
        work.sv = (float *)(memory + begin[5]);
        quip_load(layer->sv, layer->sv_type, 0, work.sv, m);
    }
    if (layer->bias) {
        work.bias = (float *)(memory + begin[6]);
        quip_load(layer->bias, layer->bias_type, 0, work.bias, m);
    }

    const int64_t tiles = (m + LANES - 1) / LANES, tile_work = LANES * n * count * planes;
    const int64_t grain = (1 << 17) / tile_work + 1; /* tiles whose work takes some microseconds */
    quip_parallel(read_vectors, &work, count, 1, threads);
    if (!work.failed) quip_parallel(multiply_tiles, &work, tiles, grain, threads);
    if (!work.failed) quip_parallel(write_vectors, &work, count, 1, threads);
    free(memory);
    return work.failed ? -2 : 0;
}
