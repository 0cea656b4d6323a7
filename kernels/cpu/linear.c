/* A quantized linear layer in one call:  y = sv * Q_out( W Q_in^T( su * x ) ) + bias.
 *
 * Products with the codes are exact sums of integers. The transformed vector is divided by a scale of its own, rounded
 * to an integer, and written in base 256 with digits from -128 to 127: one plane of int8 per digit. Three planes keep
 * 23 bits and a sign, which is what a float32 keeps of the largest entries; two keep 15 bits, one keeps 7. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

#define MOST_PLANES 3
#define MOST_COLUMNS (1 << 18) /* a sum of so many products of a byte with a digit fits into 32 bits */
#define PAD 256

typedef struct {
    const void *x;                  /* [count][n], rows x_stride apart */
    const int16_t *codes;           /* [m][ceil(n / 8)] */
    const void *su, *sv, *bias;     /* [n], [m], [m]; null for none */
    void *y;                        /* [count][m] */
    const quip_transform *in, *out; /* of size n and m; null for none */
    int64_t count, n, m, x_stride;
    int32_t x_type, su_type, sv_type, bias_type, y_type;
    int32_t planes, level, threads;
} quip_linear_call;

typedef struct {
    const quip_linear_call *call;
    quip_products products;
    int64_t stride; /* of planes */
    int8_t *planes; /* [count][planes][stride] */
    double *scale;  /* [count], of a digit's unit */
    double *offset; /* [count], the sum of a vector's integers times E8P_OFFSET */
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
    const quip_linear_call *call = work->call;
    const int64_t n = call->n;
    float *memory = quip_get_memory(2 * n * (int64_t)sizeof *memory);
    if (!memory) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t v = first; v < last; v++) {
        float *t = memory;
        quip_load(call->x, call->x_type, v * call->x_stride, t, n);
        if (work->su) quip_scale_vector(t, work->su, n);
        if (call->in) t = quip_apply(call->in, 1, t, memory + n);
        int8_t *planes = work->planes + v * call->planes * work->stride;
        make_planes(t, n, call->planes, planes, work->stride, work->scale + v, work->offset + v);
        work->offset[v] *= E8P_OFFSET;
#if defined(__x86_64__)
        if (call->level == QUIP_AVX512) quip_order_avx512(planes, call->planes * work->stride);
#endif
    }
    free(memory);
}

/* Tiles [first, last) of sixteen rows of codes, for all vectors. */
FOR_EACH_CPU static void multiply_tiles(void *context, int64_t first, int64_t last) {
    linear *work = context;
    const quip_linear_call *call = work->call;
    const int64_t blocks = (call->n + BLOCK - 1) / BLOCK, m = call->m;
    const int columns = (int)call->count * call->planes;
    int32_t on_stack[8][LANES] __attribute__((aligned(64)));
    int32_t(*sums)[LANES] = columns <= 8 ? on_stack : quip_get_memory(columns * (int64_t)sizeof *sums);
    if (!sums) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * LANES;
        const int rows = m - row < LANES ? (int)(m - row) : LANES;
        work->products(call->codes + row * blocks, rows, blocks, work->planes, work->stride, columns, sums);
        for (int64_t v = 0; v < call->count; v++) {
            const int32_t(*digits)[LANES] = (const int32_t(*)[LANES])sums + v * call->planes;
            const double unit = work->scale[v] / 4, offset = work->offset[v];
            double sum[LANES] = {0};
            float z[LANES];
            for (int c = call->planes - 1; c >= 0; c--) EACH_LANE sum[l] = 256 * sum[l] + digits[c][l];
            EACH_LANE z[l] = (float)((sum[l] - offset) * unit);
            memcpy(work->z + v * m + row, z, (size_t)rows * sizeof *z);
        }
    }
    if (sums != on_stack) free(sums);
}

/* Vectors [first, last): the output transform, sv and bias. */
static void write_vectors(void *context, int64_t first, int64_t last) {
    linear *work = context;
    const quip_linear_call *call = work->call;
    const int64_t m = call->m;
    float *scratch = quip_get_memory(m * (int64_t)sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t v = first; v < last; v++) {
        float *t = work->z + v * m;
        if (call->out) t = quip_apply(call->out, 0, t, scratch);
        if (work->sv) quip_scale_vector(t, work->sv, m);
        if (work->bias) quip_add_vector(t, work->bias, m);
        quip_store(t, call->y, call->y_type, v * m, m);
    }
    free(scratch);
}

static quip_products products_of(int level) {
#if defined(__x86_64__)
    if (level == QUIP_AVX512) return quip_products_avx512;
    if (level == QUIP_AVX2) return quip_products_avx2;
#endif
    (void)level;
    return quip_products_plain;
}

/* The best instructions that this processor has for the products: 0 plain C, 1 AVX2, 2 AVX-512 (VBMI, VNNI, GFNI). */
EXPORT int quip_cpu_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni"))
        return QUIP_AVX512;
    if (__builtin_cpu_supports("avx2")) return QUIP_AVX2;
#endif
    return QUIP_PLAIN;
}

/* See quip_linear_call. Returns 0, -1 for arguments that are out of range, -2 for want of memory. */
EXPORT int quip_e8p_linear(const quip_linear_call *call) {
    const int64_t n = call->n, m = call->m, count = call->count;
    if (n < 1 || n > MOST_COLUMNS || m < 1 || count < 0 || call->planes < 1 || call->planes > MOST_PLANES) return -1;
    if (count > INT32_MAX / MOST_PLANES || (call->in && call->in->size != n) || (call->out && call->out->size != m))
        return -1;
    if (count == 0) return 0;
    quip_e8p_make_tables();

    linear work = {.call = call, .products = products_of(call->level), .stride = (n + PAD - 1) / PAD * PAD};
    /* One piece of memory, its parts in multiples of 64 bytes. */
    const int64_t part[] = {
        count * call->planes * work.stride,        count * (int64_t)sizeof(double), count * (int64_t)sizeof(double),
        count * m * (int64_t)sizeof(float),        n * (int64_t)sizeof(float),      m * (int64_t)sizeof(float),
        call->bias ? m * (int64_t)sizeof(float) : 0,
    };
    int64_t begin[8] = {0};
    for (int i = 0; i < 7; i++) begin[i + 1] = begin[i] + (part[i] + 63) / 64 * 64;
    char *memory = quip_get_memory(begin[7]);
    if (!memory) return -2;
    work.planes = (int8_t *)memory;
    work.scale = (double *)(memory + begin[1]);
    work.offset = (double *)(memory + begin[2]);
    work.z = (float *)(memory + begin[3]);
    if (call->su) {
        work.su = (float *)(memory + begin[4]);
        quip_load(call->su, call->su_type, 0, work.su, n);
    }
    if (call->sv) {
        work.sv = (float *)(memory + begin[5]);
        quip_load(call->sv, call->sv_type, 0, work.sv, m);
    }
    if (call->bias) {
        work.bias = (float *)(memory + begin[6]);
        quip_load(call->bias, call->bias_type, 0, work.bias, m);
    }

    const int64_t tiles = (m + LANES - 1) / LANES, tile_work = LANES * n * count * call->planes;
    const int64_t grain = (1 << 17) / tile_work + 1; /* tiles that take some microseconds */
    quip_parallel(read_vectors, &work, count, 1, call->threads);
    if (!work.failed) quip_parallel(multiply_tiles, &work, tiles, grain, call->threads);
    if (!work.failed) quip_parallel(write_vectors, &work, count, 1, call->threads);
    free(memory);
    return work.failed ? -2 : 0;
}
