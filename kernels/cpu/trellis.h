/* Weights coded by a bitshift trellis, as codebooks/trellis.py describes them. */
#ifndef QUIP_TRELLIS_H
#define QUIP_TRELLIS_H

#include "common.h"

#define TILE 16
#define TILE_WEIGHTS 256
#define MOST_BITS 8
#define MARGIN 64 /* bytes behind a tile that kernels may read */

enum { TRELLIS_1MAD, TRELLIS_2MAD, TRELLIS_3INST, TRELLIS_MCG, TRELLIS_MUL1, TRELLIS_HYB, TRELLIS_QUANTLUT, TRELLIS_LUT };
enum { TRELLIS_ROWS, TRELLIS_QTIP, TRELLIS_EXL3 };
/* The form of a table: one float32 for each index; two float32; or two numbers of 16 bits in one word. */
enum { TABLE_NONE, TABLE_SINGLE, TABLE_PAIRS, TABLE_HALVES };
/* The form of a weight: codes as they are stored; records of trellis_bytes.c, whose codes are multiplied; or their bytes. */
enum { TRELLIS_STORED, TRELLIS_RECORDS, TRELLIS_BYTES };

typedef struct {
    quip_layer layer;                     /* codes: [m / 16][n / 16][8 pair_bits] or records; it has no second stage */
    const void *table;                    /* [2^table_bits][step], null for a code without one */
    int32_t code, pair_bits, order, step; /* pair_bits: of two weights; step: weights of a state, 1 or 2 */
    int32_t table_bits, table_type, form;
} quip_trellis;

/* The constants that are computed once for all tiles. */
typedef struct {
    uint8_t places[4][64] __attribute__((aligned(64))); /* places of the sixteen states of a group, see `prepare` */
    int32_t code, pair_bits;                            /* bits from one state to the second next */
    int32_t kind, bits, multiplied; /* the index into the table is the highest `bits` of 16, of s (s + 1) or of s itself */
    union {
        float *values;
        uint32_t *halves;
    };
} trellis_plan;

/* The kernels for one width of vectors. The weights of a tile are in the order of its sequence; for codes 1mad and 2mad
 * they are TRELLIS_MAD times too large. */
#define TRELLIS_MAD 147.800537109375f
typedef struct {
    void (*prepare)(trellis_plan *plan);
    void (*decode)(const trellis_plan *plan, const int16_t *tile, float *weights);
    /* sums[q] += weight q * views[q % 32], summed over a number of tiles, of codes or of decoded weights. The
     * views of the next tile are `stride` further on, which is 32 for codes. */
    void (*products)(const trellis_plan *plan, const int16_t *codes, int64_t tiles, const float *views, float *sums);
    void (*multiply)(const float *weights, int64_t tiles, const float *views, int64_t stride, float *sums);
    /* rows[stride * i + j] = weights[source[TILE * i + j]] for the weights of a tile */
    void (*arrange)(const float *weights, const int32_t *source, float *rows, int64_t stride);
} trellis_kernels;
extern HIDDEN const trellis_kernels quip_trellis_plain;

/* trellis.c: 0 for a description that is not one of a weight. Rows [first, last) of tiles, decoded one after the other:
 * take(context, row, weights) gets weights [16][n] of float32. Returns 0, or -2 without enough memory. */
HIDDEN int quip_trellis_is_sound(const quip_trellis *w);
typedef void (*trellis_taker)(void *context, int64_t row, const float *weights);
HIDDEN int quip_trellis_each_row(const quip_trellis *w, trellis_taker take, void *context, int level, int threads);
/* trellis_bytes.c: z[count][m] of x[count][n] by the bytes of records. Returns 0, or -2 without enough memory. */
HIDDEN int quip_trellis_multiply_bytes(const quip_trellis *w, const float *x, float *z, int64_t count, int level,
                                       int threads);

#define RECORD_HEAD 64 /* bytes of a record before its codes */
INLINE int64_t quip_code_bytes_of_row(const quip_trellis *w) {
    return w->layer.n * w->pair_bits;
}
/* Of a record, where its bytes begin, and where it ends. */
INLINE int64_t quip_record_bytes_begin(const quip_trellis *w) {
    return RECORD_HEAD + (quip_code_bytes_of_row(w) + 63) / 64 * 64;
}
INLINE int64_t quip_record_size(const quip_trellis *w) {
    return quip_record_bytes_begin(w) + TILE * w->layer.n;
}

#if defined(__x86_64__)
extern HIDDEN const trellis_kernels quip_trellis_avx2, quip_trellis_avx512;
#if (defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12)
#define TRELLIS_FP16 /* the compiler supports AVX512-FP16 */
/* Replaces kernels for AVX-512 by those that are faster with these instructions. */
HIDDEN void quip_trellis_use_fp16(trellis_kernels *kernels, int code);
#endif
#elif defined(QUIP_ARM)
extern HIDDEN const trellis_kernels quip_trellis_neon, quip_trellis_dotprod;
HIDDEN const trellis_kernels *quip_arm_trellis(int level); /* arm.c */
#endif

#endif
