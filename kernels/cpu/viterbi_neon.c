/* The steps of the trellis encoder with NEON. */
#include "neon.h"
#include "viterbi.h"

#if defined(QUIP_ARM)
#define WIDTH 8
#define TARGET
#define KERNELS quip_viterbi_neon
typedef uint16_t costs __attribute__((vector_size(2 * WIDTH)));
typedef costs flags;

INLINE costs pattern_for(int old) {
    costs pattern; /* bytes of costs */
    for (int l = 0; l < WIDTH; l++) pattern[l] = (uint16_t)((l >> old) * 0x0202 + 0x0100);
    return pattern;
}

INLINE costs expand(const uint16_t *before, int old, costs pattern) {
    if (old == 1) {
        const uint16x4_t four = vld1_u16(before);
        return (costs)vcombine_u16(vzip1_u16(four, four), vzip2_u16(four, four));
    }
    return (costs)vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(before)), (uint8x16_t)pattern);
}

/* The upper halves of products of 32 bits. */
INLINE costs high_of_squares(uint16x8_t q) {
    const uint32x4_t low = vmull_u16(vget_low_u16(q), vget_low_u16(q)), high = vmull_high_u16(q, q);
    return (costs)vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
}

INLINE costs distance(costs values, costs x, const int doublings) {
    /* the magnitude of -32768 is right as a number without sign */
    const uint16x8_t error = vreinterpretq_u16_s16(vabsq_s16(vqsubq_s16((int16x8_t)values, (int16x8_t)x)));
    if (!doublings) return high_of_squares(error);
    const uint16x8_t usual = vminq_u16(error, vdupq_n_u16((uint16_t)((1 << 15) >> doublings)));
    const uint16x8_t q = vshlq_u16(usual, vdupq_n_s16((int16_t)doublings));
    return (costs)vsraq_n_u16((uint16x8_t)high_of_squares(q), vsubq_u16(error, usual), 2);
}

INLINE costs add(costs a, costs b) {
    return (costs)vqaddq_u16((uint16x8_t)a, (uint16x8_t)b);
}

INLINE costs least(costs a, costs b) {
    return (costs)vminq_u16((uint16x8_t)a, (uint16x8_t)b);
}

INLINE flags keeps(costs a, costs b) {
    return (flags)vcleq_u16((uint16x8_t)a, (uint16x8_t)b);
}

INLINE costs choose(flags yes, costs a, costs b) {
    return (costs)vbslq_u16((uint16x8_t)yes, (uint16x8_t)a, (uint16x8_t)b);
}

/* The lower bytes of two vectors. */
INLINE uint8x16_t narrowed(costs first, costs second) {
    return vuzp1q_u8((uint8x16_t)first, (uint8x16_t)second);
}

/* Each byte of the result is the sum of eight bytes, of which each keeps one bit of its own. */
INLINE uint32_t bits_of(const flags *f) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t pairs = vpaddq_u8(vandq_u8(narrowed(f[0], f[1]), bit), vandq_u8(narrowed(f[2], f[3]), bit));
    const uint8x16_t fours = vpaddq_u8(pairs, pairs), eights = vpaddq_u8(fours, fours);
    return vgetq_lane_u32(vreinterpretq_u32_u8(eights), 0);
}

INLINE void store_bytes(uint8_t *to, const costs *found) {
    vst1q_u8(to, narrowed(found[0], found[1]));
    vst1q_u8(to + 16, narrowed(found[2], found[3]));
}

#include "viterbi_kernels.h"
#endif
