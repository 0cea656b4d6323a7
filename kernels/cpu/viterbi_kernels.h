/* The steps of the trellis encoder for one width of vectors; included by viterbi_plain.c, viterbi_avx2.c, viterbi_avx512.c.
 *
 * The includer defines TARGET, the attribute of functions; KERNELS, the exported name; WIDTH, numbers of 16 bits in a vector;
 * and, with `costs`, the type of such a vector without sign, and `flags`, the type of one bit for each of its lanes,
 *   pattern_for(old)                 the constant that `expand` needs
 *   expand(before, old, pattern)     lane l gets before[l >> old]; old is 1 if it is constant, else it is not 1
 *   distance(values, x, doublings)   the cost of one weight for the states with these values
 *   add(a, b)                        a + b, cut to MOST_COST
 *   least(a, b)                      the smaller numbers
 *   keeps(a, b)                      lanes where a <= b
 *   choose(yes, a, b)                a in these lanes, else b
 *   bits_of(flags)                   the flags of a block of edges as 32 bits
 *   store_bytes(to, numbers)         the numbers of a block of edges, all below 256 */
#include <string.h>

#define PARTS (BLOCK_EDGES / WIDTH)

TARGET INLINE costs load(const void *from) {
    costs value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* Costs of the paths through consecutive states. */
TARGET INLINE costs sums(const int16_t *values, const uint16_t *before, costs pattern, const costs *x, const int old,
                         const int weights, int doublings) {
    costs sum = add(expand(before, old, pattern), distance(load(values), x[0], doublings));
    if (weights == 2) sum = add(sum, distance(load(values + BLOCK_EDGES), x[1], doublings));
    return sum;
}

/* `old`, `fresh`: as in the step, or 0 for any other than 1, and than 1 and 2. */
TARGET INLINE void step_as(const viterbi_step *s, const int old, const int fresh, const int weights, const int doublings) {
    const int64_t edges = STATES >> s->fresh, row = (int64_t)weights * BLOCK_EDGES;
    const int choices = 1 << s->fresh;
    const costs pattern = pattern_for(s->old), zero = {0};
    const costs x[2] = {zero + (uint16_t)s->x[0], zero + (uint16_t)s->x[1]};
    const int16_t *values = s->values;
    uint32_t *bits = s->from;
#define SUMS(j, p)                                                                                                         \
    sums(values + (j) * row + (p) * WIDTH, s->before + (((j) * edges + e + (p) * WIDTH) >> s->old), pattern, x, old,       \
         weights, doublings)
    for (int64_t e = 0; e < edges; e += BLOCK_EDGES, values += choices * row) {
        costs best[PARTS], number[PARTS];
        if (fresh) {
            flags high[PARTS], low[PARTS];
    UNROLL
            for (int p = 0; p < PARTS; p++) {
                const costs first = SUMS(0, p), second = SUMS(1, p);
                low[p] = keeps(first, second);
                best[p] = least(first, second);
                if (fresh == 2) {
                    const costs third = SUMS(2, p), fourth = SUMS(3, p), other = least(third, fourth);
                    const flags of_others = keeps(third, fourth);
                    high[p] = keeps(best[p], other);
                    low[p] = of_others ^ ((of_others ^ low[p]) & high[p]);
                    best[p] = least(best[p], other);
                }
            }
            *bits++ = ~bits_of(low);
            if (fresh == 2) *bits++ = ~bits_of(high);
        } else {
            UNROLL
            for (int p = 0; p < PARTS; p++) best[p] = SUMS(0, p), number[p] = zero;
            for (int64_t j = 1; j < choices; j++) UNROLL
                for (int p = 0; p < PARTS; p++) {
                    const costs sum = SUMS(j, p);
                    number[p] = choose(keeps(best[p], sum), number[p], zero + (uint16_t)j);
                    best[p] = least(best[p], sum);
                }
            if (s->fresh <= 8)
                store_bytes((uint8_t *)s->from + e, number);
            else
                memcpy((uint16_t *)s->from + e, number, sizeof number);
        }
        memcpy(s->after + e, best, sizeof best);
    }
#undef SUMS
}

TARGET INLINE void step_with(const viterbi_step *s, const int weights, const int doublings) {
    if (s->old == 1)
        s->fresh == 1   ? step_as(s, 1, 1, weights, doublings)
        : s->fresh == 2 ? step_as(s, 1, 2, weights, doublings)
                        : step_as(s, 1, 0, weights, doublings);
    else
        s->fresh == 1   ? step_as(s, 0, 1, weights, doublings)
        : s->fresh == 2 ? step_as(s, 0, 2, weights, doublings)
                        : step_as(s, 0, 0, weights, doublings);
}

TARGET static void step(const viterbi_step *s) {
    if (s->weights == 1)
        s->doublings ? step_with(s, 1, s->doublings) : step_with(s, 1, 0);
    else
        s->doublings ? step_with(s, 2, s->doublings) : step_with(s, 2, 0);
}

TARGET static void rebase(uint16_t *costs_of_edges, int64_t count) {
    uint16_t smallest = MOST_COST;
    for (int64_t i = 0; i < count; i++) smallest = costs_of_edges[i] < smallest ? costs_of_edges[i] : smallest;
    for (int64_t i = 0; i < count; i++) costs_of_edges[i] = (uint16_t)(costs_of_edges[i] - smallest);
}

TARGET static void distances(const int16_t *const *values, int64_t count, int weights, const int16_t *x, int doublings,
                             int32_t *to) {
    const int32_t most = 1 << 15, cut = most >> doublings;
    for (int w = 0; w < weights; w++)
        for (int64_t i = 0; i < count; i++) {
            int32_t d = values[w][i] - x[w];
            d = d < -most ? most : d < 0 ? -d : d >= most ? most - 1 : d;
            const int32_t usual = d < cut ? d : cut, q = usual << doublings;
            d = (int32_t)((uint32_t)q * (uint32_t)q >> 16) + ((d - usual) >> 2);
            to[i] = w ? to[i] + d : d;
        }
}

HIDDEN const viterbi_kernels KERNELS = {step, rebase, distances};
