/* The kernels of trellis codes for one width of vectors; included by trellis_plain.c, trellis_avx2.c, trellis_avx512.c.
 *
 * The includer defines TARGET, the attribute of functions; KERNELS, the exported name; WIDTH, the lanes; then,
 * with the types of vectors of trellis_vectors.h,
 *   prepare(plan)                   fills plan->places
 *   states(plan, bytes, lane, odd)  states of a group, from number `lane` on; its bits begin at bytes + odd, bytes being
 *                                   even: groups of half bits have an odd number of bytes
 *   last_states(..., first)         the same of the last group of a tile, whose last state goes on in the word `first`
 *   two_mads(s)                     the 32 bits of code 2mad whose bytes are added
 *   byte_sums(h)                    the bits of the float32 2^23 + 1024 + the sum of the four bytes
 *   shifted(w, count)               w >> count
 *   look_up(table, index)           words of a table of words
 *   look_up_pairs(table, index, first, second)  pairs of float32 at 2 * index, one after the other
 *   widen(pairs, first, second)     pairs of float16, one in each word, as float32 one after the other
 *   part_of_row(weights, source)    weights[source[l]] for each lane l; all are in the same 32 weights
 *   FUSED(a, b, c)                  a b + c, rounded once; only if the processor has such an instruction */
#include <string.h>

#if !defined(UNROLL) /* loops over vectors that should stay in registers */
#define UNROLL _Pragma("GCC unroll 16")
#endif

TARGET INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

TARGET INLINE void store(float *to, floats value) {
    memcpy(to, &value, sizeof value);
}

/* v rounded to float16: to 11 bits, ties to even. Right for multiples of 2^-18 below 16, which the values here are. */
TARGET INLINE floats round_to_half(floats v) {
#if defined(FUSED)
    /* The product is rounded where v has its 11th bit; 8192 v is exact and even there, and is taken away again. */
    return FUSED(v, (floats){0} - 8192.0f, v * 8193.0f);
#else
    const words bits = (words)v;
    return (floats)((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
#endif
}

/* The sum of the two halves of h after the last step of codes 3inst and mcg. Their exponents are then known to be 12 to 15,
 * so that sign, low bits of the exponent and mantissa are moved to their places in a float32; the rest is constant. */
TARGET INLINE floats sum_of_halves(words h) {
    const words zero = {0}, mask = zero + 0x81ffe000u, constant = zero + 0x3f6c0000u;
    const words high = (words)((integers)h >> 3), low = (words)((integers)(h << 16) >> 3);
    return round_to_half((floats)((high & mask) ^ constant) + (floats)((low & mask) ^ constant));
}

TARGET INLINE floats value_of(words s, int code) {
    switch (code) {
        case TRELLIS_3INST: return sum_of_halves(s * 89226354u + 64248484u);
        case TRELLIS_MCG: return sum_of_halves(s * 0xcbac1fedu);
        case TRELLIS_MUL1: {
            const floats sum = (floats)byte_sums(s * 0x83dcd12du); /* and 2^23 */
            const float a = 0x1.bb8p-8f, c = -10.3828125f;
#if defined(FUSED)
            /* The sum of the constants is a float32, and so is the result before it is rounded. */
            const words zero = {0};
            return round_to_half(FUSED(sum, (floats)zero + a, (floats)zero + (c - 0x1p23f * a)));
#else
            return round_to_half((sum - 0x1p23f) * a + c);
#endif
        }
        case TRELLIS_2MAD: return (floats)byte_sums(two_mads(s)) - (0x1p23f + 1024 + 510);
        default: return (floats)byte_sums(s * 34038481u + 76625530u) - (0x1p23f + 1024 + 510);
    }
}

/* The indices into the table for states s. */
TARGET INLINE words index_of(const trellis_plan *plan, words s) {
    shorts t = (shorts)s; /* products modulo 2^16 are all that is needed, and the upper halves are 0 */
    if (plan->multiplied) t *= t + 1;
    return shifted((words)t, 16 - plan->bits);
}

/* The weights at these indices: one each, or two from a table of pairs; `first` has those for the first half. */
TARGET INLINE void values_at(const trellis_plan *plan, const words *index, floats *first, floats *second, int kind) {
    if (kind == TABLE_SINGLE)
        *first = (floats)look_up(plan->values, *index);
    else if (kind == TABLE_PAIRS)
        look_up_pairs(plan->values, index, first, second);
    else
        widen(look_up(plan->halves, *index), first, second);
}

/* half: whether pair_bits is odd, a constant. */
TARGET INLINE words states_of_group(const trellis_plan *plan, const int16_t *tile, int group, int groups, int lane,
                                    int half) {
    const int odd = half ? group & 1 : 0;
    const uint8_t *bytes = (const uint8_t *)tile + group * plan->pair_bits - odd;
    return group + 1 < groups ? states(plan, bytes, lane, odd) : last_states(plan, bytes, lane, odd, tile[0]);
}

#define INDEXED 8 /* tiles whose indices are computed together */

/* Place in the sequence of the first weight of vector number i, of those that come from states `lane` and on of each group. */
#define PLACE(i) (step == 1 ? TILE * (i) + lane : (i) / 2 * 2 * TILE + 2 * lane + (i) % 2 * WIDTH)

TARGET INLINE void decode_whole_or_half(const trellis_plan *plan, const int16_t *tile, float *weights, int code, int kind,
                                        int half) {
    const int step = kind < TABLE_PAIRS ? 1 : 2, groups = TILE / step;
    for (int lane = 0; lane < TILE; lane += WIDTH) UNROLL
        for (int g = 0; g < groups; g++) {
            const words s = states_of_group(plan, tile, g, groups, lane, half);
            floats first, second;
            if (kind == TABLE_NONE)
                first = value_of(s, code);
            else {
                const words index = index_of(plan, s);
                values_at(plan, &index, &first, &second, kind);
            }
            store(weights + PLACE(g * step), first);
            if (step == 2) store(weights + PLACE(g * step + 1), second);
        }
}

TARGET INLINE void decode_as(const trellis_plan *plan, const int16_t *tile, float *weights, int code, int kind) {
    decode_whole_or_half(plan, tile, weights, code, kind, 0);
}

TARGET INLINE void computed_products(const trellis_plan *plan, const int16_t *tile, int64_t tiles, const float *views,
                                     float *sums, int code, int half) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        floats sum[TILE];
        UNROLL
        for (int i = 0; i < TILE; i++) sum[i] = load(sums + TILE * i + lane);
        for (int64_t t = 0; t < tiles; t++) {
            const int16_t *codes = tile + t * (plan->pair_bits * TILE / 2);
            const floats x[2] = {load(views + 2 * TILE * t + lane), load(views + 2 * TILE * t + TILE + lane)};
            UNROLL
            for (int g = 0; g < TILE; g++)
                sum[g] += value_of(states_of_group(plan, codes, g, TILE, lane, half), code) * x[g % 2];
        }
        UNROLL
        for (int i = 0; i < TILE; i++) store(sums + TILE * i + lane, sum[i]);
    }
}

/* All indices of some tiles come before the first look-up: look-ups that do not wait for a computation just before
 * them are faster by a fifth. */
TARGET INLINE void tabulated_products(const trellis_plan *plan, const int16_t *tile, int64_t tiles, const float *views,
                                      float *sums, int kind) {
    const int step = kind < TABLE_PAIRS ? 1 : 2, groups = TILE / step;
    words index[INDEXED][TILE];
    for (int lane = 0; lane < TILE; lane += WIDTH)
        for (int64_t begin = 0; begin < tiles; begin += INDEXED) {
            const int count = tiles - begin < INDEXED ? (int)(tiles - begin) : INDEXED;
            const int16_t *codes = tile + begin * (plan->pair_bits * groups / 2);
            const float *view = views + 2 * TILE * begin;
            for (int t = 0; t < count; t++, codes += plan->pair_bits * groups / 2) UNROLL
                for (int g = 0; g < groups; g++)
                    index[t][g] = index_of(plan, states_of_group(plan, codes, g, groups, lane, 0));
            floats sum[TILE];
            UNROLL
            for (int i = 0; i < TILE; i++) sum[i] = load(sums + PLACE(i));
            for (int t = 0; t < count; t++, view += 2 * TILE) {
                const floats x[2] = {load(view + PLACE(0)), load(view + PLACE(1))};
                UNROLL
                for (int g = 0; g < groups; g++) {
                    floats first, second;
                    values_at(plan, &index[t][g], &first, &second, kind);
                    sum[g * step] += first * x[g * step % 2];
                    if (step == 2) sum[g * step + 1] += second * x[1];
                }
            }
            UNROLL
            for (int i = 0; i < TILE; i++) store(sums + PLACE(i), sum[i]);
        }
}

TARGET INLINE void products_as(const trellis_plan *plan, const int16_t *tile, int64_t tiles, const float *views, float *sums,
                               int code, int kind) {
    if (kind == TABLE_NONE)
        computed_products(plan, tile, tiles, views, sums, code, 0);
    else
        tabulated_products(plan, tile, tiles, views, sums, kind);
}

#define FOR_EACH_KIND(function, ...)                                                                                   \
    switch (plan->kind) {                                                                                              \
    case TABLE_SINGLE: function(__VA_ARGS__, TRELLIS_LUT, TABLE_SINGLE); return;                                       \
    case TABLE_PAIRS: function(__VA_ARGS__, TRELLIS_LUT, TABLE_PAIRS); return;                                         \
    case TABLE_HALVES: function(__VA_ARGS__, TRELLIS_LUT, TABLE_HALVES); return;                                       \
    default: break;                                                                                                    \
    }                                                                                                                  \
    switch (plan->code) {                                                                                              \
    case TRELLIS_1MAD: function(__VA_ARGS__, TRELLIS_1MAD, TABLE_NONE); return;                                        \
    case TRELLIS_2MAD: function(__VA_ARGS__, TRELLIS_2MAD, TABLE_NONE); return;                                        \
    case TRELLIS_3INST: function(__VA_ARGS__, TRELLIS_3INST, TABLE_NONE); return;                                      \
    case TRELLIS_MCG: function(__VA_ARGS__, TRELLIS_MCG, TABLE_NONE); return;                                          \
    default: function(__VA_ARGS__, TRELLIS_MUL1, TABLE_NONE); return;                                                  \
    }

/* Half bits, which code mul1 alone has, are functions of their own: the compiler's choice of registers for the others then
 * stays as good as without them. */
TARGET __attribute__((noinline)) static void decode_half(const trellis_plan *plan, const int16_t *tile, float *weights) {
    decode_whole_or_half(plan, tile, weights, TRELLIS_MUL1, TABLE_NONE, 1);
}

TARGET __attribute__((noinline)) static void half_products(const trellis_plan *plan, const int16_t *codes, int64_t tiles, const float *views,
                                          float *sums) {
    computed_products(plan, codes, tiles, views, sums, TRELLIS_MUL1, 1);
}

TARGET static void decode(const trellis_plan *plan, const int16_t *tile, float *weights) {
    if (plan->pair_bits % 2) {
        decode_half(plan, tile, weights);
        return;
    }
    FOR_EACH_KIND(decode_as, plan, tile, weights)
}

TARGET static void products(const trellis_plan *plan, const int16_t *codes, int64_t tiles, const float *views, float *sums) {
    if (plan->pair_bits % 2) {
        half_products(plan, codes, tiles, views, sums);
        return;
    }
    FOR_EACH_KIND(products_as, plan, codes, tiles, views, sums)
}

TARGET static void multiply(const float *weights, int64_t tiles, const float *views, int64_t stride, float *sums) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        floats sum[TILE];
        UNROLL
        for (int u = 0; u < TILE; u++) sum[u] = load(sums + u * TILE + lane);
        for (int64_t t = 0; t < tiles; t++) {
            const floats x[2] = {load(views + stride * t + lane), load(views + stride * t + TILE + lane)};
            UNROLL
            for (int u = 0; u < TILE; u++) sum[u] += load(weights + (t * TILE + u) * TILE + lane) * x[u % 2];
        }
        UNROLL
        for (int u = 0; u < TILE; u++) store(sums + u * TILE + lane, sum[u]);
    }
}

TARGET static void arrange(const float *weights, const int32_t *source, float *rows, int64_t stride) {
    for (int i = 0; i < TILE; i++)
        for (int lane = 0; lane < TILE; lane += WIDTH)
            store(rows + stride * i + lane, part_of_row(weights, source + TILE * i + lane));
}

HIDDEN const trellis_kernels KERNELS = {prepare, decode, products, multiply, arrange};
