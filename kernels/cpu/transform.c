/* Incoherence transforms: a Kronecker product is applied factor by factor, its Sylvester part by butterflies. */
#include <math.h>
#include <string.h>

#include "common.h"

#define TOGETHER 4 /* rows of a factor that are worked on at once */

/* y[b][i][a] = sum over j of g[i][j] x[b][j][a], a in whole lanes. */
INLINE void multiply_lanes(const float *restrict g, int64_t order, const float *restrict x, float *restrict y,
                           int64_t before, int64_t after) {
    for (int64_t b = 0; b < before; b++, x += order * after, y += order * after)
        for (int64_t i = 0; i < order; i += TOGETHER) {
            /* An incomplete group begins earlier, and computes some rows twice. */
            const int64_t row = order < TOGETHER ? 0 : i + TOGETHER <= order ? i : order - TOGETHER;
            const int count = order < TOGETHER ? (int)order : TOGETHER;
            for (int64_t a = 0; a < after; a += LANES) {
                float sum[TOGETHER][LANES] = {{0}};
                if (count == TOGETHER)
                    for (int64_t j = 0; j < order; j++)
                        for (int r = 0; r < TOGETHER; r++)
                            EACH_LANE sum[r][l] += g[(row + r) * order + j] * x[j * after + a + l];
                else
                    for (int64_t j = 0; j < order; j++)
                        for (int r = 0; r < count; r++)
                            EACH_LANE sum[r][l] += g[(row + r) * order + j] * x[j * after + a + l];
                for (int r = 0; r < count; r++) memcpy(y + (row + r) * after + a, sum[r], sizeof sum[r]);
            }
        }
}

/* The same for any `after`, with the transposed factor: t[j][i] = g[i][j]. */
INLINE void multiply_any(const float *restrict t, int64_t order, const float *restrict x, float *restrict y,
                         int64_t before, int64_t after) {
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

/* Sylvester's matrix of an order of at most sixteen on neighbours, and the scale of the whole Sylvester part. */
INLINE void multiply_neighbours(float *restrict x, int64_t size, int64_t order, float scale) {
    float table[LANES][LANES];
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) {
            int common = i & j, odd = 0;
            for (; common; common >>= 1) odd ^= common & 1;
            table[j][i] = odd ? -scale : scale;
        }
    if (order == LANES) {
        for (int64_t b = 0; b < size; b += LANES) {
            float sum[LANES] = {0};
            for (int j = 0; j < LANES; j++) EACH_LANE sum[l] += table[j][l] * x[b + j];
            memcpy(x + b, sum, sizeof sum);
        }
        return;
    }
    for (int64_t b = 0; b < size; b += order) {
        float sum[LANES] = {0};
        for (int j = 0; j < order; j++)
            for (int i = 0; i < order; i++) sum[i] += table[j][i] * x[b + j];
        for (int i = 0; i < order; i++) x[b + i] = sum[i];
    }
}

FOR_EACH_CPU HIDDEN float *quip_apply(const quip_transform *q, int transpose, float *x, float *scratch) {
    int64_t before = 1, after = q->size;
    for (int64_t f = 0; f < q->count; f++) {
        const int64_t order = q->orders[f];
        const float *factor = transpose ? q->transposed[f] : q->factors[f];
        after /= order;
        if (after % LANES == 0)
            multiply_lanes(factor, order, x, scratch, before, after);
        else
            multiply_any(transpose ? q->factors[f] : q->transposed[f], order, x, scratch, before, after);
        before *= order;
        float *swap = x;
        x = scratch;
        scratch = swap;
    }
    if (q->power > 1) {
        for (int64_t begin = 0; begin < q->size; begin += q->power) butterflies(x + begin, q->power);
        multiply_neighbours(x, q->size, q->power < LANES ? q->power : LANES, 1.0f / sqrtf((float)q->power));
    }
    return x;
}
