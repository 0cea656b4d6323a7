/* Nearest point of the E8P codebook, for sixteen vectors side by side.
 *
 * The search is exact. For either side of the shift, z = x -/+ 1/4 is reflected into the positive orthant, y = |z|.
 * Seven families of patterns contain all permutations of their magnitudes, so that their best member puts the largest
 * magnitudes where y is largest: a score per family from the sorted y. The 29 patterns of norm 12 are scored one by
 * one. Where the parity of the signs asks for one sign change, it goes to the coordinate where it costs least.
 */
#ifndef QUIP_E8P_SEARCH_H
#define QUIP_E8P_SEARCH_H

#include <math.h>
#include <pthread.h>
#include <string.h>

#include "lanes.h"

#define FAMILIES 7
#define KEYS 6561 /* 3^8: a pattern as eight digits, coordinate 0 first */

static int triple_at[TRIPLES][3];
static int32_t triple_mask[FAMILIES + TRIPLES];
static uint8_t pattern_of_key[KEYS];

static void make_e8p_search(void) {
    int next = 0;
    for (int key = 0; key < KEYS; key++) {
        int norm = 0; /* four times the squared norm, less 8 */
        for (int rest = key; rest; rest /= 3) norm += rest % 3 == 0 ? 0 : rest % 3 == 1 ? 8 : 24;
        if (norm <= 32) pattern_of_key[key] = (uint8_t)next++;
    }
    for (int t = 0; t < TRIPLES; t++) {
        int key = 0;
        int32_t mask = 0;
        for (int i = 0; i < 3; i++) {
            triple_at[t][i] = quip_e8p_triples[t][i] - '0';
            mask |= 1 << triple_at[t][i];
        }
        for (int i = 0; i < BLOCK; i++) key = 3 * key + !(mask >> i & 1);
        pattern_of_key[key] = (uint8_t)(next + t);
        triple_mask[FAMILIES + t] = mask;
    }
}

#if defined(QUIP_ARM)
#include "e8p_search_neon.h"
#else
/* The best pattern for one side of the shift. */
typedef struct {
    lanes_i family; /* 0..4: that many 3/2; 5: a 5/2; 6: a 5/2 and a 3/2; from 7: a triple */
    lanes_i change; /* whether one sign has to change */
    lanes_i inside; /* whether the cheapest change lies inside the triple */
    lanes_f error;
} side;

INLINE void exchange(float *restrict a, float *restrict b) {
    EACH_LANE {
        float high = a[l] > b[l] ? a[l] : b[l], low = a[l] > b[l] ? b[l] : a[l];
        a[l] = high;
        b[l] = low;
    }
}

INLINE void consider(side *best, lanes_f score, const float *restrict candidate, const int32_t *restrict change,
                     const int32_t *restrict inside, int family) {
    EACH_LANE {
        int better = candidate[l] > score[l];
        score[l] = better ? candidate[l] : score[l];
        best->family[l] = better ? family : best->family[l];
        best->change[l] = better ? change[l] : best->change[l];
        best->inside[l] = better ? inside[l] : best->inside[l];
    }
}

INLINE void search_side(const lanes_f *x, float shift, side *best) {
    lanes_f y[BLOCK], sorted[BLOCK], sum = {0}, norm = {0}, score, candidate, top;
    lanes_i odd = {0}, even, none = {0}, inside;
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            float z = x[i][l] - shift;
            y[i][l] = sorted[i][l] = fabsf(z);
            odd[l] ^= z < 0;
            sum[l] += y[i][l];
            norm[l] += z * z;
        }
    EACH_LANE even[l] = !odd[l];
    /* A sorting network of 19 exchanges, largest first. */
    static const int network[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                                       {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
    for (int i = 0; i < 19; i++) exchange(sorted[network[i][0]], sorted[network[i][1]]);
    const float *least = sorted[7];

    EACH_LANE {
        best->family[l] = 0;
        best->change[l] = odd[l];
        best->inside[l] = 0;
        top[l] = 0.5f * sum[l];
        score[l] = top[l] - 1.0f - (odd[l] ? least[l] : 0.0f);
    }
    for (int count = 1; count <= 4; count++) {
        const int32_t *change = count & 1 ? even : odd;
        EACH_LANE {
            top[l] += sorted[count - 1][l];
            candidate[l] = top[l] - 1.0f - (float)count - (change[l] ? least[l] : 0.0f);
        }
        consider(best, score, candidate, change, none, count);
    }
    EACH_LANE candidate[l] = 0.5f * sum[l] + 2.0f * sorted[0][l] - 4.0f - (odd[l] ? least[l] : 0.0f);
    consider(best, score, candidate, odd, none, 5);
    EACH_LANE candidate[l] = 0.5f * sum[l] + 2.0f * sorted[0][l] + sorted[1][l] - 5.0f - (even[l] ? least[l] : 0.0f);
    consider(best, score, candidate, even, none, 6);
    for (int t = 0; t < TRIPLES; t++) {
        const float *a = y[triple_at[t][0]], *b = y[triple_at[t][1]], *c = y[triple_at[t][2]];
        EACH_LANE {
            float smaller = a[l] < b[l] ? a[l] : b[l];
            float within = c[l] < smaller ? c[l] : smaller, beyond = 3.0f * least[l];
            inside[l] = within <= beyond;
            candidate[l] = 1.5f * sum[l] - (a[l] + b[l] + c[l]) - 6.0f -
                           (even[l] ? (within <= beyond ? within : beyond) : 0.0f);
        }
        consider(best, score, candidate, even, inside, FAMILIES + t);
    }
    EACH_LANE best->error[l] = norm[l] - 2.0f * score[l];
}

/* Nearest points of sixteen vectors x[coordinate][lane]. */
INLINE void e8p_search(const lanes_f *x, int32_t *restrict code, lanes_f *point) {
    side up, down;
    lanes_f shift, y[BLOCK];
    lanes_i minus, negative[BLOCK], rank[BLOCK], furthest, low = {0}, key = {0};
    search_side(x, 0.25f, &up);
    search_side(x, -0.25f, &down);
    EACH_LANE {
        minus[l] = down.error[l] < up.error[l];
        shift[l] = minus[l] ? -0.25f : 0.25f;
        up.family[l] = minus[l] ? down.family[l] : up.family[l];
        up.change[l] = minus[l] ? down.change[l] : up.change[l];
        up.inside[l] = minus[l] ? down.inside[l] : up.inside[l];
    }
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            float z = x[i][l] - shift[l];
            y[i][l] = fabsf(z);
            negative[i][l] = z < 0;
            rank[i][l] = 0;
        }
    for (int i = 0; i < BLOCK; i++)
        for (int j = i + 1; j < BLOCK; j++) EACH_LANE {
                int behind = y[j][l] > y[i][l];
                rank[i][l] += behind;
                rank[j][l] += !behind;
            }
    lanes_i halves;
    EACH_LANE halves[l] = triple_mask[up.family[l]];
    /* The coordinate whose sign may change, by its rank. */
    EACH_LANE furthest[l] = -1;
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            int inside = halves[l] >> i & 1 && rank[i][l] > furthest[l];
            furthest[l] = inside ? rank[i][l] : furthest[l];
        }
    EACH_LANE furthest[l] = up.family[l] >= FAMILIES && up.inside[l] ? furthest[l] : 7;
    static const int sign_bit[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int i = 0; i < BLOCK; i++) EACH_LANE {
            int family = up.family[l], r = rank[i][l];
            int digit = family <= 4   ? r < family
                        : family == 5 ? 2 * (r == 0)
                        : family == 6 ? (r == 0) + (r <= 1)
                                      : !(halves[l] >> i & 1);
            int sign = negative[i][l] ^ (up.change[l] && r == furthest[l]);
            float magnitude = 0.5f + (float)digit;
            key[l] = 3 * key[l] + digit;
            low[l] |= sign << sign_bit[i];
            point[i][l] = (sign ? -magnitude : magnitude) + shift[l];
        }
    EACH_LANE {
        /* Patterns of odd sum carry a minus on coordinate 7 in the table of the format. */
        int family = up.family[l];
        int odd_sum = family <= 4 ? family & 1 : family != 5;
        low[l] ^= odd_sum << 7;
        low[l] ^= minus[l];
    }
    EACH_LANE code[l] = pattern_of_key[key[l]] << 8 | low[l];
}
#endif

#endif
