/* Bundles: sixteen vectors side by side, entry i of all of them at [i][LANES], for layers of many bfloat16 vectors. */
#ifndef QUIP_BUNDLES_H
#define QUIP_BUNDLES_H

#include "common.h"

/* The instructions that this needs came after the first AMX: they are asked for together (`quip_has_amx`). */
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define QUIP_AMX
#endif

/* Rows and columns of weights are taken in tiles of so many, two bundles at a time. */
#define TILE_ENTRIES 32

/* In and out of bundles: what a call is told. */
typedef struct {
    const void *from;
    void *to;
    const void *scale, *bias;    /* [size], null for none */
    const quip_transform *q;     /* of that size; null for none */
    float *memory;               /* (2 threads LANES + 2) size numbers */
    int64_t size, count, stride; /* of a vector; vectors; from one to the next, where they are not in bundles */
    int scale_type, bias_type, threads;
} quip_bundle_call;

/* Q^T( scale * x ) of vectors of bfloat16, as pairs of bfloat16: entries 2 i and 2 i + 1 of vector v of a bundle are the word
 * at [i][v]. Bundles are completed with zeros to an even number. */
HIDDEN void quip_to_bundles(const quip_bundle_call *call);
/* scale * Q( x ) + bias of bundles of float32, which are overwritten, as vectors of bfloat16. */
HIDDEN void quip_from_bundles(const quip_bundle_call *call);
/* products_amx.c: z[bundles][m][LANES] of a layer's codes and x[bundles][n / 2][LANES] as quip_to_bundles writes it. memory:
 * threads * rows * (n + MARGIN) numbers of 16 bits; rows: decoded at a time by a thread, a multiple of 32. */
HIDDEN void quip_bundle_products(const quip_layer *layer, const uint32_t *x, int64_t bundles, float *z, void *memory,
                                 int64_t rows, int threads);
#define MARGIN 32 /* numbers between decoded rows, so that they do not compete for the same places of a cache */

#endif
