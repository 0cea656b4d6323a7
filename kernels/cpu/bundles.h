/* Bundles: sixteen vectors side by side, entry i of all of them at [i][LANES], for layers of many vectors of 16 bits. */
#ifndef QUIP_BUNDLES_H
#define QUIP_BUNDLES_H

#include "common.h"

/* `quip_has_amx` checks for all instructions that these files use: AMX, and AVX-512 with bfloat16. */
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define QUIP_AMX
#endif

/* Between the transforms, inputs are bfloat16 or int8, in words of 32 bits: word i of vector v of a bundle has entries 2 i and
 * 2 i + 1, or 4 i to 4 i + 3, and is at [i][v]. A tile has TILE_WORDS words of a row; bytes are completed with zeros to whole
 * tiles, and an additional row has the units of the vectors, in float32. */
#define TILE_WORDS 16
HIDDEN int64_t quip_bundle_words(int64_t n, int bytes);

/* The arguments of a call into or out of bundles. */
typedef struct {
    const void *from;
    void *to;
    const float *units; /* out: of the vectors, with integers in the bundles; null for float32 */
    /* distance from one bundle's units to the next bundle's */
    int64_t units_stride;
    const void *scale, *bias;    /* [size], null for none */
    const quip_transform *q;     /* of that size; null for none */
    float *memory;               /* (2 threads LANES + 2) size numbers */
    int64_t size, count, stride; /* of a vector; number of vectors; distance between vectors outside bundles */
    int type, scale_type, bias_type, threads; /* type: QUIP_BFLOAT16 or QUIP_FLOAT16, of vectors that are not in bundles */
    int bytes; /* into bundles: whether as int8 */
} quip_bundle_call;

/* Q^T( scale * x ) of vectors of 16 bits, in words. Bundles are completed with zeros to an even number. */
HIDDEN void quip_to_bundles(const quip_bundle_call *call);
/* scale * Q( x ) + bias of bundles of float32, or of int32 in units, which are overwritten, as vectors of 16 bits. */
HIDDEN void quip_from_bundles(const quip_bundle_call *call);
/* products_amx.c: z[bundles][m][LANES] of a layer's codes and of words as quip_to_bundles writes them: float32, or of int8 four
 * times the sums, in int32 (for codes of one stage). memory: threads * rows * (4 words + MARGIN) bytes; rows: decoded at a time
 * by a thread, a multiple of 32. */
HIDDEN void quip_bundle_products(const quip_layer *layer, const uint32_t *x, int bytes, int64_t bundles, void *z,
                                 void *memory, int64_t rows, int threads);
#define MARGIN 64 /* bytes between decoded rows, so that they do not compete for the same places of a cache */

#endif
