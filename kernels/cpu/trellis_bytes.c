/* Trellis-coded weights at one byte each, for processors on which they are read faster than they are decoded.
 *
 * A row of tiles is one record: 64 bytes, of which the first four are the float32 `unit` and the others zero; the codes of its
 * tiles as they are stored, completed with zeros to a multiple of 64 bytes; then [n / 2][16][2] bytes. Byte [k][r][i] times
 * unit is the weight of row r and column 2 k + i, rounded: 127 units are the largest weight of the record.
 *
 * A vector is rounded to integers of 16 bits. Sums of products of 512 columns are exact, and are then added in float32. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trellis.h"

#define LARGEST 127
#define LARGEST_X 32767
#define PAIR (2 * TILE) /* bytes of two columns */
#define RUN 256         /* pairs whose sums fit into 32 bits: 256 * 2 * 127 * 32767 < 2^31 */
#define MOST_TOGETHER 4 /* vectors whose sums stay in registers */

typedef struct {
    const quip_trellis *w;
    char *records;
} expansion;

FOR_EACH_CPU static float largest_of(const float *values, int64_t count) {
    float lanes[LANES] = {0}, most = 0;
    for (int64_t i = 0; i < count; i += LANES) EACH_LANE {
            const float size = fabsf(values[i + l]);
            lanes[l] = size > lanes[l] ? size : lanes[l];
        }
    for (int l = 0; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
    return most;
}

FOR_EACH_CPU static void round_to_bytes(const float *weights, int64_t n, float inverse, int8_t *bytes) {
    for (int64_t k = 0; k < n / 2; k++)
        for (int r = 0; r < TILE; r++)
            for (int i = 0; i < 2; i++) {
                const float value = weights[r * n + 2 * k + i] * inverse;
                bytes[k * PAIR + 2 * r + i] = (int8_t)(int32_t)(value + (value < 0 ? -0.5f : 0.5f));
            }
}

static void write_record(void *context, int64_t row, const float *weights) {
    const expansion *e = context;
    const int64_t n = e->w->layer.n, code_bytes = quip_code_bytes_of_row(e->w), begin = quip_record_bytes_begin(e->w);
    char *record = e->records + row * quip_record_size(e->w);
    const float most = largest_of(weights, TILE * n), unit = most / LARGEST;
    memset(record, 0, (size_t)begin);
    memcpy(record, &unit, sizeof unit);
    memcpy(record + RECORD_HEAD, (const char *)e->w->layer.codes + row * code_bytes, (size_t)code_bytes);
    /* a little less than 127, so that float32 does not round up to more; a subnormal weight has no inverse */
    round_to_bytes(weights, n, most > 1e-30f ? (LARGEST - 1e-4f) / most : 0, (int8_t *)record + begin);
}

/* records[m / 16][size of a record] of stored codes. Returns 0, -1 for arguments out of range, -2 without enough memory. */
EXPORT int quip_trellis_expand(const quip_trellis *w, void *records, int level, int threads) {
    if (!quip_trellis_is_sound(w) || w->form != TRELLIS_STORED) return -1;
    expansion e = {w, records};
    return quip_trellis_each_row(w, write_record, &e, level, threads);
}

typedef struct {
    const quip_trellis *w;
    const int16_t *x; /* [count][n] */
    const float *unit; /* [count] */
    float *z;         /* [count][m] */
    int64_t count;
    int level;
} work;

/* The vector as integers; returns their unit, which is not a number if a value is not finite. */
FOR_EACH_CPU static float round_vector(const float *x, int64_t n, int16_t *out) {
    int32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(fabsf(x[i]) <= 3.4e38f);
    float most = largest_of(x, n);
    if (bad || most == 0) {
        memset(out, 0, (size_t)n * sizeof *out);
        return bad ? NAN : 0;
    }
    most = most < 1e-30f ? 1e-30f : most; /* the inverse must be finite */
    const float inverse = LARGEST_X / most;
    for (int64_t i = 0; i < n; i++) {
        const float value = x[i] * inverse;
        const int32_t rounded = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
        out[i] = (int16_t)(rounded > LARGEST_X ? LARGEST_X : rounded < -LARGEST_X ? -LARGEST_X : rounded);
    }
    return most / LARGEST_X;
}

/* sums[v][r]: for vectors x + v * n */
FOR_EACH_CPU static void multiply_plain(const int8_t *bytes, int64_t n, const int16_t *x, int vectors,
                                        float (*sums)[TILE]) {
    for (int v = 0; v < vectors; v++) {
        memset(sums[v], 0, sizeof sums[v]);
        for (int64_t begin = 0; begin < n / 2; begin += RUN) {
            int32_t part[TILE] = {0};
            for (int64_t k = begin; k < n / 2 && k < begin + RUN; k++)
                for (int r = 0; r < TILE; r++)
                    for (int i = 0; i < 2; i++) part[r] += bytes[k * PAIR + 2 * r + i] * x[v * n + 2 * k + i];
            for (int r = 0; r < TILE; r++) sums[v][r] += (float)part[r];
        }
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

AVX2 INLINE void multiply_together(const int8_t *bytes, int64_t n, const int16_t *x, int vectors, float (*sums)[TILE]) {
    __m256 total[MOST_TOGETHER][2];
    for (int v = 0; v < vectors; v++) total[v][0] = total[v][1] = _mm256_setzero_ps();
    for (int64_t begin = 0; begin < n / 2; begin += RUN) {
        const int64_t end = n / 2 - begin < RUN ? n / 2 : begin + RUN; /* a multiple of 8 pairs, as tiles have */
        __m256i part[MOST_TOGETHER][2];
        for (int v = 0; v < vectors; v++) part[v][0] = part[v][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t k = begin; k < end; k++) {
            const __m128i *both = (const __m128i *)(bytes + k * PAIR);
            const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(both));
            const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(both + 1));
            for (int v = 0; v < vectors; v++) {
                int32_t two;
                memcpy(&two, x + v * n + 2 * k, sizeof two);
                const __m256i by = _mm256_set1_epi32(two);
                part[v][0] = _mm256_add_epi32(part[v][0], _mm256_madd_epi16(low, by));
                part[v][1] = _mm256_add_epi32(part[v][1], _mm256_madd_epi16(high, by));
            }
        }
        for (int v = 0; v < vectors; v++)
            for (int h = 0; h < 2; h++) total[v][h] = _mm256_add_ps(total[v][h], _mm256_cvtepi32_ps(part[v][h]));
    }
    for (int v = 0; v < vectors; v++)
        for (int h = 0; h < 2; h++) _mm256_storeu_ps(sums[v] + h * TILE / 2, total[v][h]);
}

AVX2 static void multiply_avx2(const int8_t *bytes, int64_t n, const int16_t *x, int vectors, float (*sums)[TILE]) {
    switch (vectors) {
        case 1: multiply_together(bytes, n, x, 1, sums); return;
        case 2: multiply_together(bytes, n, x, 2, sums); return;
        case 3: multiply_together(bytes, n, x, 3, sums); return;
        default: multiply_together(bytes, n, x, 4, sums); return;
    }
}
#endif

/* Records [first, last) times all vectors. */
static void multiply_records(void *context, int64_t first, int64_t last) {
    const work *j = context;
    const int64_t n = j->w->layer.n;
    for (int64_t r = first; r < last; r++) {
        const char *record = (const char *)j->w->layer.codes + r * quip_record_size(j->w);
        const int8_t *bytes = (const int8_t *)record + quip_record_bytes_begin(j->w);
        float unit, sums[MOST_TOGETHER][TILE];
        memcpy(&unit, record, sizeof unit);
        for (int64_t v = 0; v < j->count; v += MOST_TOGETHER) {
            const int vectors = j->count - v < MOST_TOGETHER ? (int)(j->count - v) : MOST_TOGETHER;
#if defined(__x86_64__)
            if (j->level >= QUIP_AVX2)
                multiply_avx2(bytes, n, j->x + v * n, vectors, sums);
            else
#endif
                multiply_plain(bytes, n, j->x + v * n, vectors, sums);
            for (int c = 0; c < vectors; c++) {
                float *z = j->z + (v + c) * j->w->layer.m + r * TILE;
                for (int i = 0; i < TILE; i++) z[i] = (float)((double)sums[c][i] * unit * j->unit[v + c]);
            }
        }
    }
}

HIDDEN int quip_trellis_multiply_bytes(const quip_trellis *w, const float *x, float *z, int64_t count, int level,
                                       int threads) {
    const int64_t n = w->layer.n;
    int16_t *rounded = quip_get_memory(count * n * (int64_t)sizeof *rounded);
    float *unit = quip_get_memory(count * (int64_t)sizeof *unit);
    if (rounded && unit) {
        for (int64_t v = 0; v < count; v++) unit[v] = round_vector(x + v * n, n, rounded + v * n);
        work j = {.w = w, .x = rounded, .unit = unit, .z = z, .count = count, .level = level};
        quip_parallel(multiply_records, &j, w->layer.m / TILE, (1 << 17) / (TILE * n * count) + 1, threads);
    }
    const int failed = !rounded || !unit;
    free(rounded);
    free(unit);
    return failed ? -2 : 0;
}
