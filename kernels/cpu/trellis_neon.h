/* What trellis_kernels.h needs, on 64-bit ARM; included by trellis_neon.c and trellis_dotprod.c.
 *
 * The includer defines TARGET and KERNELS, as there, and
 *   ADD_BYTES(constant, h)  constant + the sum of the four bytes, for each word of h */
#include <string.h>

#define WIDTH 4
#include "trellis_vectors.h"

/* The first byte that is read for four states from number `lane` on: an even one. */
INLINE int first_byte(const trellis_plan *plan, int lane, int odd) {
    return ((lane * plan->pair_bits >> 4) + odd) & ~1;
}

/* A lane gets the four bytes in which its state begins, the first one highest; the state is then at most 7 bits too far up.
 * Of variant 4 odd + lane / 4, the plan has 16 indices of bytes and four shifts, as negative counts to the left. */
static void prepare(trellis_plan *plan) {
    for (int variant = 0; variant < 8; variant++) {
        uint8_t *const places = plan->places[0] + 32 * variant;
        const int odd = variant / 4, lane = variant % 4 * WIDTH, from = first_byte(plan, lane, odd);
        for (int l = 0; l < WIDTH; l++) {
            const int begin = 8 * odd + ((lane + l) * plan->pair_bits + 1) / 2 - 8 * from, byte = begin / 8;
            /* memory has the second byte of a word first; bits beyond the sixteenth byte are shifted away */
            for (int i = 0; i < 4; i++) places[4 * l + 3 - i] = ((byte + i) ^ 1) & 15;
            const int32_t shift = begin % 8 - 16;
            memcpy(places + 16 + 4 * l, &shift, sizeof shift);
        }
    }
}

TARGET INLINE words states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd) {
    const uint8_t *const places = plan->places[0] + 32 * (4 * odd + lane / WIDTH);
    const uint8x16_t four = vqtbl1q_u8(vld1q_u8(bytes + first_byte(plan, lane, odd)), vld1q_u8(places));
    return (words)vshlq_u32(vreinterpretq_u32_u8(four), vld1q_s32((const int32_t *)(places + 16))) & 0xffffu;
}

TARGET INLINE words last_states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd, int16_t first) {
    uint8_t copy[MARGIN]; /* at most 32 bytes of this tile, then its first ones */
    memcpy(copy, bytes, 32);
    memcpy(copy + plan->pair_bits + odd, &first, sizeof first);
    return states(plan, copy, lane, odd);
}

TARGET INLINE words two_mads(words s) {
    const uint32x4_t g = (uint32x4_t)(s * 264435761u + 1013904223u);
    const uint32x4_t low = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(g), 1664525));
    const uint32x4_t high = vreinterpretq_u32_u64(vmull_high_n_u32(g, 1664525));
    return (words)vaddq_u32(g, vuzp2q_u32(low, high));
}

TARGET INLINE words byte_sums(words h) {
    return (words)ADD_BYTES(vdupq_n_u32(0x4b000000u + 1024), vreinterpretq_u8_u32((uint32x4_t)h));
}

TARGET INLINE words shifted(words w, int count) {
    return (words)vshlq_u32((uint32x4_t)w, vdupq_n_s32(-count));
}

TARGET INLINE words look_up(const void *table, words index) {
    const uint32_t *const from = table;
    return (words){from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
}

TARGET INLINE void look_up_pairs(const float *table, const words *index, floats *first, floats *second) {
    const words i = *index;
    *first = (floats)vcombine_f32(vld1_f32(table + 2 * i[0]), vld1_f32(table + 2 * i[1]));
    *second = (floats)vcombine_f32(vld1_f32(table + 2 * i[2]), vld1_f32(table + 2 * i[3]));
}

TARGET INLINE void widen(words pairs, floats *first, floats *second) {
    const float16x8_t halves = vreinterpretq_f16_u32((uint32x4_t)pairs);
    *first = (floats)vcvt_f32_f16(vget_low_f16(halves));
    *second = (floats)vcvt_high_f32_f16(halves);
}

TARGET INLINE floats part_of_row(const float *weights, const int32_t *source) {
    words index;
    memcpy(&index, source, sizeof index);
    return (floats)look_up(weights, index);
}

#define FUSED(a, b, c) ((floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#include "trellis_kernels.h"
