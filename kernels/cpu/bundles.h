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
    const void *scale, *bias;       /* [size], null for none */
    const quip_transform *q;        /* of that size; null for none */
    float *memory;                  /* (2 threads LANES + 2) size numbers */
    int64_t size, count, stride;    /* of a vector; vectors; from one to the next, where they are not in bundles */
    int32_t scale_type, bias_type, threads;
} quip_bundle_call;

#endif
