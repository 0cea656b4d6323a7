/* Rounding of a panel of columns to a uniform grid, with feedback.
 *
 * As in encode.c sixteen rows are worked on side by side, one per vector lane. Columns are taken in strips. Within a
 * strip, every column passes its error on at once. The columns before the strip get the errors of the whole strip
 * together, so they are read and written once. */
#include <math.h>
#include <string.h>

#include "common.h"

#define MOST_COLUMNS 256
#define STRIP 8

typedef struct {
    const float *target, *base, *feedback;
    uint8_t *codes;
    float *points, *delta;
    int64_t rows, columns;
    float largest;
} panel;

typedef float lanes_f[LANES];

/* wanted[c] += sum over the columns [from, until) of their change times feedback, for each c in [least, from). */
INLINE void pass_on(const panel *p, lanes_f *wanted, const lanes_f *change, int64_t from, int64_t until, int64_t least) {
    for (int64_t c = least; c < from; c++) {
        lanes_f sum;
        memcpy(sum, wanted[c], sizeof sum);
        for (int64_t i = from; i < until; i++) {
            const float weight = p->feedback[i * p->columns + c];
            EACH_LANE sum[l] += weight * change[i - from][l];
        }
        memcpy(wanted[c], sum, sizeof sum);
    }
}

INLINE void round_group(const panel *p, int64_t row, lanes_f *wanted) {
    const int count = p->rows - row < LANES ? (int)(p->rows - row) : LANES;
    const int64_t columns = p->columns;
    const float largest = p->largest, half = largest / 2;
    lanes_f change[STRIP], step;
    memset(wanted, 0, (size_t)columns * sizeof *wanted);
    for (int l = 0; l < count; l++)
        for (int64_t c = 0; c < columns; c++) wanted[c][l] = p->target[(row + l) * columns + c];
    for (int64_t end = columns; end > 0; end -= STRIP) {
        const int64_t begin = end > STRIP ? end - STRIP : 0;
        for (int64_t c = end - 1; c >= begin; c--) {
            EACH_LANE {
                const float k = rintf(wanted[c][l] + half), capped = k > largest ? largest : k;
                step[l] = capped > 0 ? capped : 0; /* NaN becomes 0 */
            }
            memset(change[c - begin], 0, sizeof *change);
            for (int l = 0; l < count; l++) {
                const int64_t at = (row + l) * columns + c;
                p->codes[at] = (uint8_t)step[l];
                p->points[at] = step[l] - half;
                p->delta[at] = change[c - begin][l] = p->base[at] - p->points[at];
            }
            pass_on(p, wanted, change + (c - begin), c, c + 1, begin);
        }
        pass_on(p, wanted, change, begin, end, 0);
    }
}

/* Groups [first, last) of sixteen rows. */
FOR_EACH_CPU static void round_groups(void *context, int64_t first, int64_t last) {
    lanes_f wanted[MOST_COLUMNS];
    for (int64_t group = first; group < last; group++) round_group(context, group * LANES, wanted);
}

/* Round a panel [rows][columns] to the points k - largest / 2, k = 0 ... largest, from its last column to its first:
 *   x_c = target_c + sum over later columns j of delta_j feedback[j][c];  point_c = nearest(x_c);
 *   delta_c = base_c - point_c.
 * codes: the numbers k. columns: at most 256; largest: at most 255. Returns 0, or -1 for other sizes. */
EXPORT int quip_round_panel_scalar(const float *target, const float *base, const float *feedback, int64_t rows,
                                   int64_t columns, int largest, uint8_t *codes, float *points, float *delta, int threads) {
    panel p = {target, base, feedback, codes, points, delta, rows, columns, (float)largest};
    if (rows < 0 || columns < 1 || columns > MOST_COLUMNS || largest < 1 || largest > 255) return -1;
    quip_parallel(round_groups, &p, (rows + LANES - 1) / LANES, 1, threads);
    return 0;
}
