/* The encoder of trellis codes: the two passes through each tile, on top of the steps in viterbi_kernels.h. */
#include "viterbi.h"

#include <stdlib.h>
#include <string.h>

#define TILE_WEIGHTS 256
#define MOST_EDGES (STATES / 2)
#define PIECE 1024 /* states whose distances are computed at a time where there are no kernels */

typedef struct {
    const int16_t *levels[2]; /* [2^16] for each weight of a state */
    const int16_t *blocked[2]; /* for even and odd states, see viterbi_step; null where the step is not in blocks */
    const int16_t *x;         /* [count][256] */
    int16_t *states;          /* [count][steps] */
    int weights, steps, doublings, window, passes, fresh[2];
    int64_t pointers; /* bytes of the choices at a step */
    viterbi_kernels kernels;
    struct scratch *scratch;
    int rooms;
} encoder;

/* The memory of one thread. */
struct scratch {
    char taken;
    void *memory; /* holds all of the others */
    uint16_t *costs[2]; /* of edges; the first is current */
    int32_t *exact[2];  /* of the edges that can be reached from the first */
    uint16_t *opening;  /* choices at the step after which all edges are reached */
    uint8_t *from;      /* choices at every step */
};

static int fresh_of(const encoder *c, int t) {
    return c->fresh[t & 1];
}

static int64_t pointer_bytes(int fresh) {
    const int64_t edges = STATES >> fresh;
    if (fresh > MOST_BLOCKED) return 2 * edges;
    return fresh <= 2 ? edges / 8 * fresh : fresh <= 8 ? edges : 2 * edges;
}

/* The highest bits of the best state in front of an edge. For one or two bits every 32 edges have as many words, the first
 * with the low bits; for up to eight there are bytes. */
static uint32_t choice(const void *from, int fresh, int64_t edge) {
    if (fresh > 8) return ((const uint16_t *)from)[edge];
    if (fresh > 2) return ((const uint8_t *)from)[edge];
    const uint32_t *words = (const uint32_t *)from + edge / 32 * fresh;
    const uint32_t low = words[0] >> edge % 32 & 1;
    return fresh == 1 ? low : low | (words[1] >> edge % 32 & 1) << 1;
}

/* Paths through states [first, first + count), which are all that can be reached: costs of the edges behind them, and which
 * state is best in front of each. Sums are cut to `most`. `before` and `after` begin with the edges of the first state. */
static void step_through(const encoder *c, int t, const int16_t *x, int64_t first, int64_t count, const int32_t *before,
                         int32_t *after, uint16_t *from, int32_t most) {
    int32_t distances[PIECE];
    const int old = fresh_of(c, t), fresh = fresh_of(c, t + 1);
    const int64_t edges = STATES >> fresh, origin = count < edges ? first & (edges - 1) : 0;
    for (int64_t i = 0; i < (count < edges ? count : edges); i++) after[i] = INT32_MAX;
    for (int64_t begin = first; begin < first + count; begin += PIECE) {
        const int64_t end = begin + PIECE < first + count ? begin + PIECE : first + count;
        const int16_t *values[2] = {c->levels[0] + begin, c->weights == 2 ? c->levels[1] + begin : 0};
        c->kernels.distances(values, end - begin, c->weights, x, c->doublings, distances);
        for (int64_t s = begin; s < end; s++) {
            int32_t sum = before[(s >> old) - (first >> old)] + distances[s - begin];
            if (sum > most) sum = most;
            const int64_t edge = (s & (edges - 1)) - origin;
            if (sum < after[edge]) {
                after[edge] = sum;
                from[edge] = (uint16_t)(s >> (STATE_BITS - fresh));
            }
        }
    }
}

static void swap(uint16_t **two) {
    uint16_t *const first = two[0];
    two[0] = two[1];
    two[1] = first;
}

/* One step from all edges to all edges: z->costs[0] are replaced. */
static void step(const encoder *c, struct scratch *z, int t, const int16_t *x, void *from) {
    const int old = fresh_of(c, t), fresh = fresh_of(c, t + 1);
    if (c->blocked[t & 1]) {
        const viterbi_step s = {.values = c->blocked[t & 1],
                                .before = z->costs[0],
                                .after = z->costs[1],
                                .from = from,
                                .old = old,
                                .fresh = fresh,
                                .weights = c->weights,
                                .doublings = c->doublings,
                                .x = {x[0], c->weights == 2 ? x[1] : 0}};
        c->kernels.step(&s);
        swap(z->costs);
        return;
    }
    for (int64_t e = 0; e < STATES >> old; e++) z->exact[0][e] = z->costs[0][e];
    step_through(c, t, x, 0, STATES, z->exact[0], z->exact[1], from, MOST_COST);
    for (int64_t e = 0; e < STATES >> fresh; e++) z->costs[0][e] = (uint16_t)z->exact[1][e];
}

/* The steps from the edge before state `begin` on, until every edge is reached; the states that can be reached are
 * consecutive. The costs are then in z->costs[0], the choices of the last step in z->opening. Returns the number of steps. */
static int open_from(const encoder *c, struct scratch *z, const int16_t *x, int begin, int64_t edge) {
    int i = 0, bits = 0; /* edges [edge, edge + 2^bits) are reached */
    int32_t *before = z->exact[0], *after = z->exact[1];
    before[0] = 0;
    for (; bits < STATE_BITS - fresh_of(c, i); i++) {
        const int t = (begin + i) % c->steps, old = fresh_of(c, i), fresh = fresh_of(c, i + 1);
        step_through(c, t, x + t * c->weights, edge << old, (int64_t)1 << (bits + old), before, after, z->opening,
                     INT32_MAX);
        edge = edge << old & ((STATES >> fresh) - 1);
        bits += old;
        if (bits >= STATE_BITS - fresh) {
            bits = STATE_BITS - fresh;
            edge = 0;
        }
        int32_t *const swapped = before;
        before = after;
        after = swapped;
    }
    const int64_t edges = (int64_t)1 << bits;
    int32_t least = INT32_MAX;
    for (int64_t e = 0; e < edges; e++) least = before[e] < least ? before[e] : least;
    for (int64_t e = 0; e < edges; e++) {
        const int32_t above = before[e] - least;
        z->costs[0][e] = (uint16_t)(above < MOST_COST ? above : MOST_COST);
    }
    return i;
}

/* Steps [first, last) of a pass that begins with state `begin`. */
static void run_steps(const encoder *c, struct scratch *z, const int16_t *x, int begin, int first, int last) {
    for (int i = first; i < last; i++) {
        const int t = (begin + i) % c->steps;
        step(c, z, t, x + t * c->weights, z->from + i * c->pointers);
        if (i % REBASED == REBASED - 1) c->kernels.rebase(z->costs[0], STATES >> fresh_of(c, t + 1));
    }
}

/* The state of the best path at step i of a pass, from the edge behind it. */
static int64_t state_before(const encoder *c, const struct scratch *z, int i, int64_t edge) {
    const int fresh = fresh_of(c, i + 1);
    return (int64_t)choice(z->from + i * c->pointers, fresh, edge) << (STATE_BITS - fresh) | edge;
}

/* The edge before the first state, from the best path through the window around it. */
static int64_t find_seam(const encoder *c, struct scratch *z, const int16_t *x) {
    const int half = c->window / 2, begin = c->steps - half;
    memset(z->costs[0], 0, (size_t)(STATES >> fresh_of(c, begin)) * sizeof **z->costs);
    run_steps(c, z, x, begin, 0, 2 * half);
    int64_t edge = 0;
    for (int64_t e = 1; e < STATES >> fresh_of(c, begin + 2 * half); e++)
        if (z->costs[0][e] < z->costs[0][edge]) edge = e;
    for (int i = 2 * half - 1; i >= half; i--) {
        const int fresh = fresh_of(c, begin + i + 1);
        const int64_t state = (int64_t)choice(z->from + i * c->pointers, fresh, edge) << (STATE_BITS - fresh) | edge;
        edge = state >> fresh_of(c, begin + i);
    }
    return edge;
}

/* The best closed path through the given edge before state `begin`, an even number. */
static void close_path(const encoder *c, struct scratch *z, const int16_t *x, int begin, int64_t seam, int16_t *states) {
    const int opened = open_from(c, z, x, begin, seam);
    run_steps(c, z, x, begin, opened, c->steps);
    int64_t edge = seam;
    for (int i = c->steps - 1; i >= opened; i--) {
        const int64_t state = state_before(c, z, i, edge);
        states[(begin + i) % c->steps] = (int16_t)state;
        edge = state >> fresh_of(c, i);
    }
    if (!opened) return;
    /* The last state with choices of its own has the new bits of all before it. */
    const int64_t last = (int64_t)z->opening[edge] << (STATE_BITS - fresh_of(c, opened)) | edge;
    int left = 0;
    for (int i = 0; i < opened; i++) left += fresh_of(c, i);
    edge = seam;
    for (int i = 0; i < opened; i++) {
        const int old = fresh_of(c, i);
        left -= old;
        edge = (edge << old | (last >> left & ((1 << old) - 1))) & (STATES - 1);
        states[(begin + i) % c->steps] = (int16_t)edge;
    }
}

/* Every pass after the first keeps an edge of the path before it, on the other side of the tile, so that no pass is worse. */
static void encode_tile(const encoder *c, struct scratch *z, const int16_t *x, int16_t *states) {
    int64_t seam = find_seam(c, z, x);
    for (int pass = 0; pass < c->passes; pass++) {
        const int begin = pass % 2 * (c->steps / 2);
        if (pass) seam = (uint16_t)states[begin] >> fresh_of(c, begin);
        close_path(c, z, x, begin, seam, states);
    }
}

static void encode_tiles(void *context, int64_t first, int64_t last) {
    const encoder *c = context;
    int room = 0;
    while (__atomic_test_and_set(&c->scratch[room].taken, __ATOMIC_ACQUIRE)) room = (room + 1) % c->rooms;
    for (int64_t i = first; i < last; i++)
        encode_tile(c, c->scratch + room, c->x + i * TILE_WEIGHTS, c->states + i * c->steps);
    __atomic_clear(&c->scratch[room].taken, __ATOMIC_RELEASE);
}

/* Levels in the order in which the steps read them. */
static void arrange(const encoder *c, int fresh, int16_t *to) {
    const int64_t edges = STATES >> fresh;
    for (int64_t e = 0; e < edges; e += BLOCK_EDGES)
        for (int64_t j = 0; j < 1 << fresh; j++)
            for (int w = 0; w < c->weights; w++, to += BLOCK_EDGES)
                memcpy(to, c->levels[w] + j * edges + e, BLOCK_EDGES * sizeof *to);
}

static int get_scratch(const encoder *c, struct scratch *z) {
    const int64_t costs = MOST_EDGES + READ_BEYOND;
    uint8_t *memory = quip_get_memory(4 * costs + 10 * MOST_EDGES + c->steps * c->pointers);
    if (!memory) return -2;
    memset(memory, 0, (size_t)(4 * costs));
    z->memory = memory;
    z->costs[0] = (uint16_t *)memory;
    z->costs[1] = z->costs[0] + costs;
    z->exact[0] = (int32_t *)(z->costs[1] + costs);
    z->exact[1] = z->exact[0] + MOST_EDGES;
    z->opening = (uint16_t *)(z->exact[1] + MOST_EDGES);
    z->from = (uint8_t *)(z->opening + MOST_EDGES);
    return 0;
}

static viterbi_kernels kernels_of(int level) {
#if defined(__x86_64__)
    if (level == QUIP_AVX512) return quip_viterbi_avx512;
    if (level == QUIP_AVX2) return quip_viterbi_avx2;
#elif defined(QUIP_ARM)
    if (level >= QUIP_NEON) return quip_viterbi_neon;
#endif
    (void)level;
    return quip_viterbi_plain;
}

/* states[count][256 / weights] of x[count][256].
 * levels: [weights][2^16]. even, odd: new bits of states with an even number and of the others. window: steps of the first
 * pass, even. level: at most quip_cpu_level(). Returns 0, -1 for arguments out of range, -2 without enough memory. */
EXPORT int quip_viterbi(const int16_t *x, int64_t count, const int16_t *levels, int weights, int even, int odd,
                        int doublings, int window, int passes, int16_t *states, int level, int threads) {
    if (count < 0 || weights < 1 || weights > 2 || even < 1 || even > STATE_BITS || odd < 1 || odd > STATE_BITS ||
        doublings < 0 || doublings > 15 || window < 2 || window % 2 || passes < 1 || window > TILE_WEIGHTS / weights)
        return -1;
    if (!count) return 0;
    encoder c = {.levels = {levels, weights == 2 ? levels + STATES : 0},
                 .x = x,
                 .states = states,
                 .weights = weights,
                 .steps = TILE_WEIGHTS / weights,
                 .doublings = doublings,
                 .window = window,
                 .passes = passes,
                 .fresh = {even, odd},
                 .kernels = kernels_of(level)};
    if (threads > count) threads = (int)count;
    c.rooms = threads < 1 ? 1 : threads;
    const int64_t bytes = (int64_t)weights * STATES * (int64_t)sizeof *levels;
    int16_t *blocked[2] = {0, 0};
    int failed = 0;
    for (int t = 0; t < 2; t++) { /* the steps through even states are followed by odd ones */
        const int fresh = c.fresh[1 - t];
        c.pointers = c.pointers > pointer_bytes(fresh) ? c.pointers : pointer_bytes(fresh);
        if (fresh > MOST_BLOCKED) continue;
        if (t == 1 && even == odd) {
            c.blocked[1] = blocked[0];
            continue;
        }
        c.blocked[t] = blocked[t] = quip_get_memory(bytes);
        if (blocked[t])
            arrange(&c, fresh, blocked[t]);
        else
            failed = -2;
    }
    c.pointers = (c.pointers + 63) / 64 * 64;
    c.scratch = calloc((size_t)c.rooms, sizeof *c.scratch);
    if (!c.scratch) failed = -2;
    for (int i = 0; i < c.rooms && !failed; i++) failed = get_scratch(&c, c.scratch + i);
    if (!failed) quip_parallel(encode_tiles, &c, count, 1, c.rooms);
    for (int i = 0; i < c.rooms && c.scratch; i++) free(c.scratch[i].memory);
    free(c.scratch);
    free(blocked[0]);
    free(blocked[1]);
    return failed;
}
