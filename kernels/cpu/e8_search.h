/* Nearest of the 256 points of the one-byte E8 codebook, for sixteen vectors side by side.
 *
 * The search is exact. The best point of each kind follows from y = |x|: zero; a point of norm 2 with two entries +/- 1
 * where y is largest; a point of halves with the signs of x, where an odd number of minus signs changes the sign at the
 * least y; and +/- 2 along the axis where y is largest. -2 along the last axis is missing, but its replacement, 2 along
 * another axis, is never better than a point of norm 2.
 */
#ifndef QUIP_E8_SEARCH_H
#define QUIP_E8_SEARCH_H

#include <math.h>

#include "lanes.h"

#define E8_ROOTS 112 /* of two entries +/- 1; their codes, with the code of zero in the middle, come first */
#define E8_ZERO (E8_ROOTS / 2)
#define E8_HALVES (E8_ROOTS + 1)
#define E8_AXES (E8_HALVES + 128)

/* Codes of the roots with entries at i and j, either of them first: 4 (8 i + j) + 2 (minus at i) + (minus at j). */
static uint8_t root_code[256];

/* In lexicographic order the first entry that is not zero decides: of the negative ones, the earliest is the least. */
static void make_e8_search(void) {
    int code = 0;
    for (int minus_first = 1; minus_first >= 0; minus_first--)
        for (int step = 0; step < 7; step++) {
            const int first = minus_first ? step : 6 - step;
            for (int sign = 1; sign >= 0; sign--)
                for (int k = first + 1; k < BLOCK; k++) {
                    /* at the same first entry, minus at the second: the earlier the less; plus: the later the less */
                    const int second = sign ? k : BLOCK + first - k;
                    root_code[4 * (8 * first + second) + 2 * minus_first + sign] = (uint8_t)code;
                    root_code[4 * (8 * second + first) + 2 * sign + minus_first] = (uint8_t)code;
                    if (++code == E8_ZERO) code++;
                }
        }
}

/* Nearest points of sixteen vectors x[coordinate][lane]. */
INLINE void e8_search(const lanes_f *x, int32_t *restrict code, lanes_f *point) {
    enum { ZERO, ROOT, HALF, AXIS };
    lanes_f most = {0}, second, least, sum = {0}, score = {0};
    lanes_i most_at = {0}, second_at = {0}, least_at = {0}, minus = {0}, odd = {0}, kind = {0};
    EACH_LANE {
        most[l] = second[l] = -1.0f;
        least[l] = INFINITY;
    }
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            const float y = fabsf(x[i][l]);
            const int first = y > most[l], next = y > second[l], last = y < least[l], negative = x[i][l] < 0;
            second[l] = first ? most[l] : next ? y : second[l];
            second_at[l] = first ? most_at[l] : next ? i : second_at[l];
            most[l] = first ? y : most[l];
            most_at[l] = first ? i : most_at[l];
            least[l] = last ? y : least[l];
            least_at[l] = last ? i : least_at[l];
            minus[l] |= negative << i;
            odd[l] ^= negative;
            sum[l] += y;
        }
    EACH_LANE {
        /* <x, p> - |p|^2 / 2, which is 0 for zero */
        const float root = most[l] + second[l] - 1.0f;
        const float half = 0.5f * sum[l] - (odd[l] ? least[l] : 0.0f) - 1.0f;
        const int missing = most_at[l] == 7 && minus[l] >> 7;
        const float axis = missing ? -1.0f : 2.0f * most[l] - 2.0f;
        kind[l] = root > 0 ? ROOT : ZERO;
        score[l] = root > 0 ? root : 0.0f;
        kind[l] = half > score[l] ? HALF : kind[l];
        score[l] = half > score[l] ? half : score[l];
        kind[l] = axis > score[l] ? AXIS : kind[l];
        /* from here on: the minus signs of the point with halves */
        minus[l] ^= kind[l] == HALF && odd[l] ? 1 << least_at[l] : 0;
    }
    lanes_i plus = {0};
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            const int negative = minus[l] >> i & 1;
            const int entry = i == most_at[l] || (kind[l] == ROOT && i == second_at[l]);
            const float size = kind[l] == HALF   ? 0.5f
                               : kind[l] == AXIS ? (entry ? 2.0f : 0.0f)
                               : kind[l] == ROOT ? (entry ? 1.0f : 0.0f)
                                                 : 0.0f;
            point[i][l] = negative && size > 0 ? -size : size;
            plus[l] |= !negative << (7 - i);
        }
    EACH_LANE {
        const int first = minus[l] >> most_at[l] & 1, next = minus[l] >> second_at[l] & 1;
        const int root = root_code[4 * (8 * most_at[l] + second_at[l]) + 2 * first + next];
        code[l] = kind[l] == HALF   ? E8_HALVES + (plus[l] >> 1)
                  : kind[l] == AXIS ? E8_AXES + most_at[l] + 8 * first
                  : kind[l] == ROOT ? root
                                    : E8_ZERO;
    }
}

#endif
