/* Vectors of 16 bits to bundles and back, with a transform, with AVX-512.
 *
 * In a bundle every step of a transform is the same operation on sixteen neighbours. Data is shuffled only when a vector
 * is read and when it is written. */
#include "bundles.h"

#if defined(QUIP_AMX)
#include <immintrin.h>
#include <math.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define UNROLL _Pragma("GCC unroll 32")

#define ROWS 6    /* of a factor, computed together with */
#define COLUMNS 4 /* entries: 24 sums, which fit into registers */

#define ENTRIES 32 /* that are transposed at once */

#define MOST_SIGNS 128 /* largest order of a factor of signs */
#define PAIR 2         /* entries computed at once; both numbers are also fixed in cpu_linear.py */

/* `rows` results from `row` on for `columns` neighbours: y[i] = sum over j of t[j][i] x[j], both `after` entries apart. */
AVX512 INLINE void multiply_entries(const float *t, int64_t order, int64_t row, const int rows, const int columns,
                                    const float *x, float *y, int64_t after) {
    __m512 sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t j = 0; j < order; j++) {
        __m512 entry[COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) entry[c] = _mm512_loadu_ps(x + (j * after + c) * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512 by = _mm512_set1_ps(t[j * order + row + r]);
            UNROLL for (int c = 0; c < columns; c++) sum[r][c] = _mm512_fmadd_ps(by, entry[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++)
        _mm512_storeu_ps(y + ((row + r) * after + c) * LANES, sum[r][c]);
}

/* A factor, transposed to t[j][i], that acts on entries which are `after` apart. */
AVX512 static void multiply_factor(const float *t, int64_t order, const float *x, float *y, int64_t size, int64_t after) {
    for (int64_t begin = 0; begin < size; begin += order * after)
        for (int64_t a = begin; a < begin + after; a += COLUMNS) {
            const int64_t columns = begin + after - a < COLUMNS ? begin + after - a : COLUMNS;
            int64_t row = 0;
            if (columns == COLUMNS)
                for (; row + ROWS <= order; row += ROWS)
                    multiply_entries(t, order, row, ROWS, COLUMNS, x + a * LANES, y + a * LANES, after);
            for (; row < order; row++)
                for (int64_t c = a; c < a + columns; c++)
                    multiply_entries(t, order, row, 1, 1, x + c * LANES, y + c * LANES, after);
        }
}

/* The same for a factor whose entries have one magnitude, without that magnitude. The sixteen signed sums of each four
 * entries are computed once, and each row looks up its own instead of summing the four. signs[i][g]: the address of the
 * sum for row i of entries 4 g to 4 g + 3 ("four Russians"; Arlazarov et al., Doklady 11, 1970). In place. */
AVX512 static void multiply_signs(const uint16_t *signs, int64_t order, float *x, int64_t size, int64_t after) {
    float sums[MOST_SIGNS / 4][16][PAIR][LANES] __attribute__((aligned(64)));
    const int64_t groups = order / 4;
    for (int64_t begin = 0; begin < size; begin += order * after)
        for (int64_t a = begin; a < begin + after; a += PAIR) {
            const int64_t second = a + 1 < begin + after ? 1 : 0; /* a single last entry is computed twice */
            for (int64_t g = 0; g < groups; g++)
                UNROLL for (int c = 0; c < PAIR; c++) {
                    const float *from = x + (a + c * second + 4 * g * after) * LANES;
                    __m512 v[4], low[4], high[4];
                    UNROLL for (int k = 0; k < 4; k++) v[k] = _mm512_loadu_ps(from + k * after * LANES);
                    low[0] = _mm512_add_ps(v[0], v[1]);
                    low[1] = _mm512_sub_ps(v[1], v[0]);
                    low[2] = _mm512_sub_ps(v[0], v[1]);
                    low[3] = _mm512_sub_ps(_mm512_setzero_ps(), low[0]);
                    high[0] = _mm512_add_ps(v[2], v[3]);
                    high[1] = _mm512_sub_ps(v[3], v[2]);
                    high[2] = _mm512_sub_ps(v[2], v[3]);
                    high[3] = _mm512_sub_ps(_mm512_setzero_ps(), high[0]);
                    UNROLL for (int i = 0; i < 16; i++)
                        _mm512_store_ps(sums[g][i][c], _mm512_add_ps(low[i % 4], high[i / 4]));
                }
            for (int64_t i = 0; i < order; i += 4) {
                const uint16_t *at = signs + i * groups;
                __m512 sum[4][PAIR];
                UNROLL for (int r = 0; r < 4; r++) UNROLL for (int c = 0; c < PAIR; c++) sum[r][c] = _mm512_setzero_ps();
                for (int64_t g = 0; g < groups; g++, at++)
                    UNROLL for (int r = 0; r < 4; r++) {
                        const char *found = (const char *)sums + at[r * groups];
                        UNROLL for (int c = 0; c < PAIR; c++)
                            sum[r][c] = _mm512_add_ps(sum[r][c], _mm512_load_ps(found + 4 * LANES * c));
                    }
                UNROLL for (int r = 0; r < 4; r++) UNROLL for (int c = 0; c < PAIR; c++)
                    _mm512_storeu_ps(x + (a + c * second + (i + r) * after) * LANES, sum[r][c]);
            }
        }
}

/* Sylvester's matrix of order `radix`, which acts on entries that are `step` apart, in place. */
AVX512 INLINE void butterflies(float *x, int64_t size, int64_t step, const int radix) {
    for (int64_t begin = 0; begin < size; begin += radix * step)
        for (int64_t a = begin; a < begin + step; a++) {
            __m512 v[16];
            UNROLL for (int i = 0; i < radix; i++) v[i] = _mm512_loadu_ps(x + (a + i * step) * LANES);
            UNROLL for (int half = 1; half < radix; half *= 2) UNROLL for (int i = 0; i < radix; i++)
                if (!(i & half)) {
                    const __m512 difference = _mm512_sub_ps(v[i], v[i + half]);
                    v[i] = _mm512_add_ps(v[i], v[i + half]);
                    v[i + half] = difference;
                }
            UNROLL for (int i = 0; i < radix; i++) _mm512_storeu_ps(x + (a + i * step) * LANES, v[i]);
        }
}

/* The transform of a bundle, without the factor `unit_of`. Returns x or scratch, whichever has the result. */
AVX512 static float *apply(const quip_transform *q, int transpose, float *x, float *scratch) {
    int64_t after = q->size, step = 1;
    for (int64_t f = 0; f < q->count; f++) {
        after /= q->orders[f];
        if (q->signs[f]) {
            multiply_signs(transpose ? q->signs_transposed[f] : q->signs[f], q->orders[f], x, q->size, after);
            continue;
        }
        multiply_factor(transpose ? q->factors[f] : q->transposed[f], q->orders[f], x, scratch, q->size, after);
        float *swap = x;
        x = scratch;
        scratch = swap;
    }
    for (; step * 16 <= q->power; step *= 16) butterflies(x, q->size, step, 16);
    switch (q->power / step) {
        case 8: butterflies(x, q->size, step, 8); break;
        case 4: butterflies(x, q->size, step, 4); break;
        case 2: butterflies(x, q->size, step, 2); break;
        default: break;
    }
    return x;
}

/* The product of the magnitudes of the factors that are applied as signs. */
static float unit_of(const quip_transform *q) {
    double squared = (double)q->power;
    for (int64_t f = 0; f < q->count; f++) squared *= q->signs[f] ? (double)q->orders[f] : 1;
    return (float)(1 / sqrt(squared));
}

/* Sixteen rows of sixteen words become columns. */
AVX512 INLINE void turn(__m512i *v) {
    __m512i a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* b[4 r + i] has columns i, i + 4, ... of rows 4 r and on */
        const __m512i even = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        const __m512i evens = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        const __m512i odds = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(even, evens, 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(odd, odds, 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(even, evens, 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(odd, odds, 0xdd);
    }
}

/* Entries i and i + 1 of sixteen vectors, as bfloat16, in one word each. */
AVX512 INLINE __m512i pair(__m512 first, __m512 second) {
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* The same as float16. */
AVX512 INLINE __m512i pair_float16(__m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* The first and the second entry of each word. */
AVX512 INLINE void part(__m512i word, const int type, __m512 *entries) {
    if (type == QUIP_FLOAT16) {
        entries[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word));
        entries[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
    } else {
        entries[0] = (__m512)_mm512_slli_epi32(word, 16);
        entries[1] = (__m512)_mm512_and_si512(word, _mm512_set1_epi32(-65536));
    }
}

/* scale * x for `count` vectors at `x`; the rest of the sixteen are zero. */
AVX512 INLINE void read(const quip_bundle_call *call, const uint16_t *x, int64_t count, const float *scale, float *to,
                        const int type) {
    for (int64_t i = 0; i < call->size; i += ENTRIES) {
        __m512i v[LANES];
        UNROLL for (int r = 0; r < LANES; r++)
            v[r] = _mm512_maskz_loadu_epi32(r < count ? 0xffff : 0, x + r * call->stride + i);
        turn(v);
        UNROLL for (int k = 0; k < LANES; k++) {
            __m512 entry[2];
            float *at = to + (i + 2 * k) * LANES;
            part(v[k], type, entry);
            _mm512_storeu_ps(at, _mm512_mul_ps(entry[0], _mm512_set1_ps(scale[i + 2 * k])));
            _mm512_storeu_ps(at + LANES, _mm512_mul_ps(entry[1], _mm512_set1_ps(scale[i + 2 * k + 1])));
        }
    }
}

AVX512 static void read_bundle(const quip_bundle_call *call, const uint16_t *x, int64_t count, const float *scale, float *to) {
    if (call->type == QUIP_FLOAT16)
        read(call, x, count, scale, to, QUIP_FLOAT16);
    else
        read(call, x, count, scale, to, QUIP_BFLOAT16);
}

AVX512 static void write_pairs(const float *x, int64_t size, uint32_t *to) {
    for (int64_t i = 0; i < size; i += 2)
        _mm512_storeu_si512(to + i / 2 * LANES, pair(_mm512_loadu_ps(x + i * LANES), _mm512_loadu_ps(x + (i + 1) * LANES)));
}

/* The same as int8, completed with zeros, each vector with its own unit: its largest entry over 127. */
AVX512 static void write_fours(const float *x, int64_t size, uint32_t *to) {
    const __m512i low = _mm512_set1_epi32(255), infinite = _mm512_set1_epi32(0x7f800000);
    const int64_t words = quip_bundle_words(size, 1);
    __m512i bits = _mm512_setzero_si512(); /* bits of magnitudes are ordered as integers, with NaN above all */
    for (int64_t i = 0; i < size; i++)
        bits = _mm512_max_epu32(bits, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i * LANES))));
    const __mmask16 bad = _mm512_cmpge_epu32_mask(bits, infinite);
    const __m512 most = _mm512_max_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(1e-30f)); /* the inverse must be finite */
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127), most);
    for (int64_t i = 0; i < size; i += 4) {
        __m512i v[4];
        UNROLL for (int e = 0; e < 4; e++)
            v[e] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + (i + e) * LANES), inverse));
        const __m512i even = _mm512_or_si512(_mm512_and_si512(v[0], low), _mm512_slli_epi32(_mm512_and_si512(v[2], low), 16));
        const __m512i odd = _mm512_or_si512(_mm512_and_si512(v[1], low), _mm512_slli_epi32(v[3], 16));
        _mm512_storeu_si512(to + i / 4 * LANES, _mm512_or_si512(even, _mm512_slli_epi32(odd, 8)));
    }
    for (int64_t i = size / 4; i < words; i++) _mm512_storeu_si512(to + i * LANES, _mm512_setzero_si512());
    const __m512 unit = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / 127));
    _mm512_storeu_ps(to + words * LANES, _mm512_mask_blend_ps(bad, unit, _mm512_set1_ps(NAN)));
}

/* Sums of four times a weight with int8 become float32, in place. */
AVX512 static void measure(float *x, int64_t size, const float *units) {
    const __m512 unit = _mm512_mul_ps(_mm512_loadu_ps(units), _mm512_set1_ps(0.25f));
    for (int64_t i = 0; i < size; i++)
        _mm512_storeu_ps(x + i * LANES, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(x + i * LANES)), unit));
}

/* scale * x + bias, to `count` vectors. */
AVX512 INLINE void write(const quip_bundle_call *call, const float *x, int64_t count, const float *scale, const float *bias,
                         uint16_t *to, const int type) {
    for (int64_t i = 0; i < call->size; i += ENTRIES) {
        __m512i v[LANES];
        UNROLL for (int k = 0; k < LANES; k++) {
            __m512 entry[2];
            UNROLL for (int e = 0; e < 2; e++) {
                const int64_t at = i + 2 * k + e;
                entry[e] = _mm512_fmadd_ps(_mm512_loadu_ps(x + at * LANES), _mm512_set1_ps(scale[at]), _mm512_set1_ps(bias[at]));
            }
            v[k] = type == QUIP_FLOAT16 ? pair_float16(entry[0], entry[1]) : pair(entry[0], entry[1]);
        }
        turn(v);
        UNROLL for (int r = 0; r < LANES; r++)
            if (r < count) _mm512_storeu_si512(to + r * call->stride + i, v[r]);
    }
}

AVX512 static void write_vectors(const quip_bundle_call *call, const float *x, int64_t count, const float *scale,
                                 const float *bias, uint16_t *to) {
    if (call->type == QUIP_FLOAT16)
        write(call, x, count, scale, bias, to, QUIP_FLOAT16);
    else
        write(call, x, count, scale, bias, to, QUIP_BFLOAT16);
}

typedef struct {
    const quip_bundle_call *call;
    float *scale, *bias;
    int64_t bundles, next;
} work;

/* One thread's share, in its own memory. */
static void to_bundles(void *context, int64_t first, int64_t last) {
    work *w = context;
    const quip_bundle_call *call = w->call;
    float *memory = w->bias + call->size + 2 * first * LANES * call->size, *scratch = memory + LANES * call->size;
    const int64_t bundle = (quip_bundle_words(call->size, call->bytes) + call->bytes) * LANES;
    (void)last;
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->bundles;) {
        float *x = memory;
        read_bundle(call, (const uint16_t *)call->from + b * LANES * call->stride, call->count - b * LANES, w->scale, x);
        if (call->q) x = apply(call->q, 1, x, scratch);
        (call->bytes ? write_fours : write_pairs)(x, call->size, (uint32_t *)call->to + b * bundle);
    }
}

static void from_bundles(void *context, int64_t first, int64_t last) {
    work *w = context;
    const quip_bundle_call *call = w->call;
    float *scratch = w->bias + call->size + 2 * first * LANES * call->size;
    (void)last;
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->bundles;) {
        float *x = (float *)call->from + b * LANES * call->size;
        if (call->units) measure(x, call->size, call->units + b * call->units_stride);
        if (call->q) x = apply(call->q, 0, x, scratch);
        write_vectors(call, x, call->count - b * LANES, w->scale, w->bias, (uint16_t *)call->to + b * LANES * call->stride);
    }
}

static void run(const quip_bundle_call *call, quip_body body, int64_t bundles) {
    work w = {call, call->memory, call->memory + call->size, bundles, 0};
    const float unit = call->q ? unit_of(call->q) : 1.0f;
    if (call->scale) quip_load(call->scale, call->scale_type, 0, w.scale, call->size);
    if (call->bias) quip_load(call->bias, call->bias_type, 0, w.bias, call->size);
    for (int64_t i = 0; i < call->size; i++) {
        w.scale[i] = call->scale ? w.scale[i] * unit : unit;
        if (!call->bias) w.bias[i] = 0;
    }
    quip_parallel(body, &w, call->threads, 1, call->threads);
}

HIDDEN int64_t quip_bundle_words(int64_t n, int bytes) {
    return bytes ? (n / 4 + TILE_WORDS - 1) / TILE_WORDS * TILE_WORDS : n / 2;
}

HIDDEN void quip_to_bundles(const quip_bundle_call *call) {
    run(call, to_bundles, (call->count + 2 * LANES - 1) / (2 * LANES) * 2);
}

HIDDEN void quip_from_bundles(const quip_bundle_call *call) { run(call, from_bundles, (call->count + LANES - 1) / LANES); }

#endif
