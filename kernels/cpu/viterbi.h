/* The encoder of trellis codes, as codebooks/viterbi.py describes it: edges, costs, and which of equal costs wins. */
#ifndef QUIP_VITERBI_H
#define QUIP_VITERBI_H

#include "common.h"

#define STATE_BITS 16
#define STATES (1 << STATE_BITS)
#define MOST_COST 0xffff
#define REBASED 2 /* steps after which the least cost is subtracted from all */
#define BLOCK_EDGES 32  /* edges whose costs are computed together */
#define MOST_BLOCKED 11 /* new bits of a state, so that there is at least one block of edges before it */
#define READ_BEYOND 32  /* numbers behind the costs that kernels may read */

/* One state of the paths: from the costs of the edges before it to those of the edges behind it. */
typedef struct {
    /* [2^(16 - fresh) / 32][2^fresh][weights][32]: the values of the states in front of 32 edges, for the first choice of
     * their highest bits, then for the others. */
    const int16_t *values;
    const uint16_t *before; /* [2^(16 - old)] */
    uint16_t *after;        /* [2^(16 - fresh)] */
    void *from;             /* the choices: see `choice` in viterbi.c */
    int old, fresh;         /* new bits of this state, and of the next */
    int weights, doublings;
    int16_t x[2];
} viterbi_step;

/* The kernels for one width of vectors. */
typedef struct {
    void (*step)(const viterbi_step *step); /* fresh: at most MOST_BLOCKED */
    void (*rebase)(uint16_t *costs, int64_t count); /* subtracts the least of them */
    /* Costs of `count` states for the weights x; values[v][i] of weight v. */
    void (*distances)(const int16_t *const *values, int64_t count, int weights, const int16_t *x, int doublings,
                      int32_t *to);
} viterbi_kernels;
extern HIDDEN const viterbi_kernels quip_viterbi_plain;
#if defined(__x86_64__)
extern HIDDEN const viterbi_kernels quip_viterbi_avx2, quip_viterbi_avx512;
#elif defined(QUIP_ARM)
extern HIDDEN const viterbi_kernels quip_viterbi_neon;
#endif

#endif
