/* Instructions of 64-bit ARM: NEON, which all of these processors have, and the dot products of bytes that most have. */
#ifndef QUIP_NEON_H
#define QUIP_NEON_H

#include "common.h"

#if defined(QUIP_ARM)
#include <arm_neon.h>

/* The attribute of functions with dot products. Older compilers have none, so that their library has no such level. */
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
#elif defined(__clang__) && __clang_major__ >= 16
#define DOTPROD __attribute__((target("dotprod")))
#elif !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 8
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#define UNROLL _Pragma("GCC unroll 16") /* loops over vectors that should stay in registers */
#define code_bytes(codebook) ((codebook) == QUIP_E8P ? 2 : 1)

/* The bytes of four codes. */
typedef struct {
    int8x16_t low, high;
} weights;

HIDDEN void quip_products_neon(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                               int64_t stride, int columns, int32_t (*sums)[LANES]);
HIDDEN void quip_nibbles_neon(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                              int32_t (*sums)[LANES]);
#if defined(DOTPROD)
HIDDEN void quip_nibbles_dotprod(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                                 int32_t (*sums)[LANES]);
HIDDEN void quip_products_dotprod(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                  int64_t stride, int columns, int32_t (*sums)[LANES]);
#endif
#endif

#endif
