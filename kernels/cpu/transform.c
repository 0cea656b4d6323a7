/* Incoherence transforms: a Kronecker product is applied factor by factor, its Sylvester part by butterflies. */
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "common.h"

#define ROWS 6 /* of a factor, computed together with */
#if defined(QUIP_ARM)
#include "transform_neon.h"

#define COLUMNS 1 /* piece of LANES numbers: 24 vectors of sums, which fit into registers */
#else
#define COLUMNS 2 /* pieces of LANES numbers: twelve sums, which fit into registers */
#endif

/* Sums of `rows` rows from `row` on and of `columns` pieces of LANES numbers, at x[c] and y[c]; `after` apart for each j. */
INLINE void multiply_tile(const float *restrict t, int64_t order, int64_t row, int rows, int columns,
                          const float *const *restrict x, float *const *restrict y, int64_t after) {
    float sum[ROWS][COLUMNS][LANES] = {{{0}}};
    for (int64_t j = 0; j < order; j++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) EACH_LANE sum[r][c][l] += t[j * order + row + r] * x[c][j * after + l];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) memcpy(y[c] + (row + r) * after, sum[r][c], sizeof sum[r][c]);
}

/* y[b][i][a] = sum over j of t[j][i] x[b][j][a], a in whole lanes. */
INLINE void multiply_lanes(const float *restrict t, int64_t order, const float *restrict x, float *restrict y,
                           int64_t before, int64_t after) {
    const int64_t lanes = after / LANES, pieces = before * lanes;
    for (int64_t piece = 0; piece < pieces; piece += COLUMNS) {
        const int columns = pieces - piece < COLUMNS ? 1 : COLUMNS;
        const float *from[COLUMNS];
        float *to[COLUMNS];
        for (int c = 0; c < columns; c++) {
            const int64_t offset = (piece + c) / lanes * order * after + (piece + c) % lanes * LANES;
            from[c] = x + offset;
            to[c] = y + offset;
        }
        for (int64_t i = 0; i < order; i += ROWS) {
            /* An incomplete group begins earlier, and computes some rows twice. */
            const int64_t row = order < ROWS ? 0 : i + ROWS <= order ? i : order - ROWS;
            if (order < ROWS)
                multiply_tile(t, order, row, (int)order, columns, from, to, after);
            else if (columns == COLUMNS)
                multiply_tile(t, order, row, ROWS, COLUMNS, from, to, after);
            else
                multiply_tile(t, order, row, ROWS, 1, from, to, after);
        }
    }
}

/* The same for any `after`, with the transposed factor: t[j][i] = g[i][j]. */
INLINE void multiply_any(const float *restrict t, int64_t order, const float *restrict x, float *restrict y, int64_t before,
                         int64_t after) {
    memset(y, 0, (size_t)(before * order * after) * sizeof *y);
    for (int64_t b = 0; b < before; b++, x += order * after, y += order * after)
        for (int64_t j = 0; j < order; j++)
            for (int64_t a = 0; a < after; a++) {
                const float value = x[j * after + a];
                for (int64_t i = 0; i < order; i++) y[i * after + a] += t[j * order + i] * value;
            }
}

/* Butterflies of the stages size/2, size/4, ..., LANES, in place: two stages a pass. */
INLINE void butterflies(float *restrict x, int64_t size) {
    int64_t half = size / 2;
    for (; half >= 2 * LANES; half /= 4) {
        const int64_t step = half / 2;
        for (int64_t begin = 0; begin < size; begin += 2 * half)
            for (int64_t i = begin; i < begin + step; i += LANES) {
                float *a = x + i, *b = a + step, *c = b + step, *d = c + step;
                EACH_LANE {
                    const float s = a[l] + c[l], t = a[l] - c[l], u = b[l] + d[l], v = b[l] - d[l];
                    a[l] = s + u;
                    b[l] = s - u;
                    c[l] = t + v;
                    d[l] = t - v;
                }
            }
    }
    if (half >= LANES)
        for (int64_t begin = 0; begin < size; begin += 2 * half)
            for (int64_t i = begin; i < begin + half; i += LANES) {
                float *a = x + i, *b = a + half;
                EACH_LANE {
                    const float s = a[l] + b[l], t = a[l] - b[l];
                    a[l] = s;
                    b[l] = t;
                }
            }
}

#define GROUPS 4 /* groups of neighbours computed at once, so that no sum waits for the one before it */

/* Sylvester's matrix of an order of at most LANES: its entry in row i and column j is -1 where i & j has an odd number of
 * ones. Larger ones begin with the smaller. */
static float sylvester[LANES][LANES];

static void make_sylvester(void) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) sylvester[i][j] = __builtin_popcount((unsigned)(i & j)) % 2 ? -1.0f : 1.0f;
}

INLINE void multiply_group(float *restrict x, int64_t order) {
    float sum[LANES] = {0};
    for (int j = 0; j < order; j++)
        for (int i = 0; i < order; i++) sum[i] += sylvester[j][i] * x[j];
    memcpy(x, sum, (size_t)order * sizeof *sum);
}

INLINE void multiply_groups(float *restrict x) {
    float sum[GROUPS][LANES] = {{0}};
    for (int j = 0; j < LANES; j++)
        for (int g = 0; g < GROUPS; g++) EACH_LANE sum[g][l] += sylvester[j][l] * x[g * LANES + j];
    for (int g = 0; g < GROUPS; g++) memcpy(x + g * LANES, sum[g], sizeof sum[g]);
}

/* Sylvester's matrix of an order of at most LANES times neighbours, and the scale of the whole Sylvester part. */
INLINE void multiply_neighbours(float *restrict x, int64_t size, int64_t order, float scale) {
#if defined(QUIP_ARM)
    if (order == LANES) {
        multiply_sixteens(x, size, scale);
        return;
    }
#endif
    if (order == LANES) {
        const int64_t whole = size / (GROUPS * LANES) * (GROUPS * LANES);
        for (int64_t b = 0; b < whole; b += GROUPS * LANES) multiply_groups(x + b);
        for (int64_t b = whole; b < size; b += LANES) multiply_group(x + b, LANES);
    } else {
        for (int64_t b = 0; b < size; b += order) multiply_group(x + b, order);
    }
    for (int64_t i = 0; i < size; i++) x[i] *= scale;
}

FOR_EACH_CPU HIDDEN float *quip_apply_many(const quip_transform *q, int transpose, float *x, float *scratch,
                                           int64_t count) {
    int64_t before = count, after = q->size;
    for (int64_t f = 0; f < q->count; f++) {
        const int64_t order = q->orders[f];
        const float *columns = transpose ? q->factors[f] : q->transposed[f];
        after /= order;
        if (after % LANES == 0)
            multiply_lanes(columns, order, x, scratch, before, after);
        else
            multiply_any(columns, order, x, scratch, before, after);
        before *= order;
        float *swap = x;
        x = scratch;
        scratch = swap;
    }
    if (q->power > 1) {
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        pthread_once(&once, make_sylvester);
        const int64_t size = count * q->size;
        for (int64_t begin = 0; begin < size; begin += q->power) butterflies(x + begin, q->power);
        multiply_neighbours(x, size, q->power < LANES ? q->power : LANES, 1.0f / sqrtf((float)q->power));
    }
    return x;
}

HIDDEN float *quip_apply(const quip_transform *q, int transpose, float *x, float *scratch) {
    return quip_apply_many(q, transpose, x, scratch, 1);
}
