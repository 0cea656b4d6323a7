/* Products of rows of codes with int8 planes, with NEON. */
#include "neon.h"

#if defined(QUIP_ARM)
#define TARGET
#define PRODUCTS quip_products_neon
#define NIBBLES quip_nibbles_neon
#define USE_DOT 0
/* Four products of a byte with a digit stay within 16 bits: 4 * 42 * 128 < 2^15. */
#define dot(sum, w, x) vpadalq_s16(sum, products_of_32(w, x))

INLINE int16x8_t products_of_32(weights w, const int8_t *x) {
    const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    int16x8_t sum = vmull_s8(vget_low_s8(w.low), vget_low_s8(low));
    sum = vmlal_high_s8(sum, w.low, low);
    sum = vmlal_s8(sum, vget_low_s8(w.high), vget_low_s8(high));
    return vmlal_high_s8(sum, w.high, high);
}

#include "products_neon.h"
#include "nibbles_neon.h"
#endif
