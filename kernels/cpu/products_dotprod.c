/* Products of rows of codes with int8 planes, with the dot products of bytes. */
#include "neon.h"

#if defined(DOTPROD)
#define TARGET DOTPROD
#define PRODUCTS quip_products_dotprod
#define NIBBLES quip_nibbles_dotprod
#define USE_DOT 1
#define dot(sum, w, x) vdotq_s32(vdotq_s32(sum, (w).low, vld1q_s8(x)), (w).high, vld1q_s8((x) + 16))

#include "products_neon.h"
#include "nibbles_neon.h"
#endif
