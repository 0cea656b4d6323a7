/* The search of e8p_search.h with NEON, for four vectors in registers; included there. */
#include "neon.h"

#define FOUR 4

/* Where one of two scores is better, its family. Which sign changes follows from the family, and from the ranks. */
typedef struct {
    float32x4_t score;
    int32x4_t family;
} best_family;

INLINE void offer(best_family *best, float32x4_t score, int family) {
    const uint32x4_t better = vcgtq_f32(score, best->score);
    best->score = vbslq_f32(better, score, best->score);
    best->family = vbslq_s32(better, vdupq_n_s32(family), best->family);
}

INLINE float32x4_t where(uint32x4_t mask, float32x4_t value) {
    return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(value)));
}

/* The best family for one side of the shift; its error; and where the number of minus signs is odd. */
static __attribute__((noinline)) int32x4_t search_side(const float32x4_t *x, float shift, float32x4_t *error,
                                                       uint32x4_t *odd_signs) {
    static const char triples[TRIPLES][4] = {E8P_TRIPLES};
    static const int network[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                                       {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
    float32x4_t y[BLOCK], sorted[BLOCK], sum = vdupq_n_f32(0), norm = sum;
    uint32x4_t odd = vdupq_n_u32(0);
    UNROLL for (int i = 0; i < BLOCK; i++) {
        const float32x4_t z = vsubq_f32(x[i], vdupq_n_f32(shift));
        y[i] = sorted[i] = vabsq_f32(z);
        odd = veorq_u32(odd, vcltzq_f32(z));
        sum = vaddq_f32(sum, y[i]);
        norm = vfmaq_f32(norm, z, z);
    }
#pragma GCC unroll 19
    for (int i = 0; i < 19; i++) {
        const float32x4_t a = sorted[network[i][0]], b = sorted[network[i][1]];
        sorted[network[i][0]] = vmaxq_f32(a, b);
        sorted[network[i][1]] = vminq_f32(a, b);
    }
    const uint32x4_t even = vmvnq_u32(odd);
    const float32x4_t if_odd = where(odd, sorted[7]), if_even = where(even, sorted[7]), half = vmulq_n_f32(sum, 0.5f);
    float32x4_t top = vsubq_f32(half, vdupq_n_f32(1));
    best_family best = {vsubq_f32(top, if_odd), vdupq_n_s32(0)};
    UNROLL for (int count = 1; count <= 4; count++) {
        top = vaddq_f32(top, vsubq_f32(sorted[count - 1], vdupq_n_f32(1)));
        offer(&best, vsubq_f32(top, count & 1 ? if_even : if_odd), count);
    }
    top = vsubq_f32(vfmaq_n_f32(half, sorted[0], 2), vdupq_n_f32(4));
    offer(&best, vsubq_f32(top, if_odd), 5);
    top = vaddq_f32(top, vsubq_f32(sorted[1], vdupq_n_f32(1)));
    offer(&best, vsubq_f32(top, if_even), 6);
    const float32x4_t all = vsubq_f32(vmulq_n_f32(sum, 1.5f), vdupq_n_f32(6)), beyond = vmulq_n_f32(sorted[7], 3);
#pragma GCC unroll 29
    for (int t = 0; t < TRIPLES; t++) {
        const float32x4_t a = y[triples[t][0] - '0'], b = y[triples[t][1] - '0'], c = y[triples[t][2] - '0'];
        const float32x4_t cheapest = vminq_f32(vminq_f32(a, b), vminq_f32(c, beyond));
        const float32x4_t rest = vsubq_f32(all, vaddq_f32(vaddq_f32(a, b), c));
        offer(&best, vsubq_f32(rest, where(even, cheapest)), FAMILIES + t);
    }
    *error = vfmsq_n_f32(norm, best.score, 2);
    *odd_signs = odd;
    return best.family;
}

INLINE int32x4_t halves_of(int32x4_t family) {
    const int32_t found[FOUR] = {triple_mask[family[0]], triple_mask[family[1]], triple_mask[family[2]],
                                 triple_mask[family[3]]};
    return vld1q_s32(found);
}

/* Vectors [first, first + 4) of the sixteen. */
static __attribute__((noinline)) void search_four(const lanes_f *from, int first, int32_t *code, lanes_f *point) {
    static const int sign_bit[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7};
    float32x4_t x[BLOCK], y[BLOCK], errors[2];
    uint32x4_t odds[2], negative[BLOCK];
    int32x4_t rank[BLOCK];
    UNROLL for (int i = 0; i < BLOCK; i++) x[i] = vld1q_f32(from[i] + first);
    const int32x4_t up = search_side(x, 0.25f, errors, odds), down = search_side(x, -0.25f, errors + 1, odds + 1);
    const uint32x4_t minus = vcltq_f32(errors[1], errors[0]);
    const int32x4_t family = vbslq_s32(minus, down, up), none = vdupq_n_s32(-1);
    const float32x4_t shift = vbslq_f32(minus, vdupq_n_f32(-0.25f), vdupq_n_f32(0.25f));
    const uint32x4_t is_triple = vcgeq_s32(family, vdupq_n_s32(FAMILIES)), is_few = vcleq_s32(family, vdupq_n_s32(4));
    /* whether the magnitudes of the family have an odd sum: then an even number of minus signs asks for a change */
    const uint32x4_t odd_sum = vbslq_u32(is_few, vtstq_s32(family, vdupq_n_s32(1)),
                                         vmvnq_u32(vceqq_s32(family, vdupq_n_s32(5))));
    const uint32x4_t change = veorq_u32(vbslq_u32(minus, odds[1], odds[0]), odd_sum);
    UNROLL for (int i = 0; i < BLOCK; i++) {
        const float32x4_t z = vsubq_f32(x[i], shift);
        y[i] = vabsq_f32(z);
        negative[i] = vcltzq_f32(z);
        rank[i] = vdupq_n_s32(i);
    }
    UNROLL for (int i = 0; i < BLOCK; i++) UNROLL for (int j = i + 1; j < BLOCK; j++) {
        const int32x4_t behind = vreinterpretq_s32_u32(vcgtq_f32(y[j], y[i])); /* -1 or 0 */
        rank[i] = vsubq_s32(rank[i], behind);
        rank[j] = vaddq_s32(rank[j], behind);
    }
    /* The coordinate whose sign may change, by its rank: the least of all, or of the triple if that costs less. */
    const int32x4_t halves = halves_of(family);
    int32x4_t furthest = none;
    float32x4_t within = vdupq_n_f32(INFINITY), least = within;
    UNROLL for (int i = 0; i < BLOCK; i++) {
        const uint32x4_t inside = vtstq_s32(halves, vdupq_n_s32(1 << i));
        furthest = vmaxq_s32(furthest, vbslq_s32(inside, rank[i], none));
        within = vminq_f32(within, vbslq_f32(inside, y[i], within));
        least = vminq_f32(least, y[i]);
    }
    const uint32x4_t is_inside = vandq_u32(is_triple, vcleq_f32(within, vmulq_n_f32(least, 3)));
    furthest = vbslq_s32(is_inside, furthest, vdupq_n_s32(7));
    /* Ranks below `some` have a digit of at least 1, those below `most` of 2; a triple has 1 outside of its halves. */
    const int32x4_t some = vbslq_s32(is_few, family, vsubq_s32(family, vdupq_n_s32(4)));
    const int32x4_t most = vreinterpretq_s32_u32(vandq_u32(vmvnq_u32(vorrq_u32(is_few, is_triple)), vdupq_n_u32(1)));
    int32x4_t key = vdupq_n_s32(0);
    uint32x4_t low = vandq_u32(minus, vdupq_n_u32(1)); /* patterns of odd sum have a minus on coordinate 7 in the table */
    low = veorq_u32(low, vandq_u32(odd_sum, vdupq_n_u32(1 << 7)));
    UNROLL for (int i = 0; i < BLOCK; i++) {
        const uint32x4_t outside = vceqzq_s32(vandq_s32(halves, vdupq_n_s32(1 << i)));
        const uint32x4_t one = vbslq_u32(is_triple, outside, vcltq_s32(rank[i], some));
        const uint32x4_t sign = veorq_u32(negative[i], vandq_u32(change, vceqq_s32(rank[i], furthest)));
        int32x4_t digit = vnegq_s32(vreinterpretq_s32_u32(one));
        digit = vsubq_s32(digit, vreinterpretq_s32_u32(vcltq_s32(rank[i], most)));
        const float32x4_t magnitude = vaddq_f32(vcvtq_f32_s32(digit), vdupq_n_f32(0.5f));
        key = vmlaq_n_s32(digit, key, 3);
        low = veorq_u32(low, vandq_u32(sign, vdupq_n_u32(1u << sign_bit[i])));
        vst1q_f32(point[i] + first, vaddq_f32(vbslq_f32(sign, vnegq_f32(magnitude), magnitude), shift));
    }
    UNROLL for (int l = 0; l < FOUR; l++) code[first + l] = (int32_t)((uint32_t)pattern_of_key[key[l]] << 8 | low[l]);
}

INLINE void e8p_search(const lanes_f *x, int32_t *restrict code, lanes_f *point) {
    for (int first = 0; first < LANES; first += FOUR) search_four(x, first, code, point);
}
