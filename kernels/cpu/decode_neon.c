/* Weights of E8P codes with NEON. */
#include <string.h>

#include "neon.h"

#if defined(QUIP_ARM)

/* Sixteen weights of 16 bits from their bytes. */
INLINE uint8x16x2_t values_of(uint8x16_t bytes, uint8x16_t low, uint8x16_t high) {
    const uint8x16_t index = vandq_u8(vshrq_n_u8(bytes, 1), vdupq_n_u8(15)); /* bytes are even */
    return vzipq_u8(vqtbl1q_u8(low, index), vqtbl1q_u8(high, index));
}

INLINE uint64x2_t two_codes(uint64_t codes) {
    const uint64x2_t pattern = vcombine_u64(vld1_u64(quip_e8p_pattern + (codes >> 8 & 255)),
                                            vld1_u64(quip_e8p_pattern + (codes >> 24 & 255)));
    const uint64x2_t signs = vcombine_u64(vld1_u64(quip_e8p_signs + (codes & 255)),
                                          vld1_u64(quip_e8p_signs + (codes >> 16 & 255)));
    return veorq_u64(pattern, signs);
}

HIDDEN int64_t quip_decode_neon(const quip_grid *g, const int16_t *codes, int64_t row) {
    const uint8x16x2_t tables = vld2q_u8((const uint8_t *)g->values); /* the lower and the upper bytes */
    const int64_t begin = (row - g->origin) * g->stride, columns = g->columns;
    const int is_float32 = g->type == QUIP_FLOAT32;
    void *const to = g->out;
    int64_t k = 0;
    for (; BLOCK * (k + 2) <= columns; k += 2) {
        uint32_t two;
        memcpy(&two, codes + k, sizeof two);
        const uint8x16x2_t v = values_of(vreinterpretq_u8_u64(two_codes(two)), tables.val[0], tables.val[1]);
        if (is_float32) {
            uint32_t *out = (uint32_t *)to + begin + BLOCK * k;
            for (int i = 0; i < 2; i++) {
                const uint16x8_t half = vreinterpretq_u16_u8(v.val[i]);
                vst1q_u32(out + BLOCK * i, vshll_n_u16(vget_low_u16(half), 16));
                vst1q_u32(out + BLOCK * i + 4, vshll_high_n_u16(half, 16));
            }
        } else {
            uint8_t *out = (uint8_t *)((uint16_t *)to + begin + BLOCK * k);
            vst1q_u8(out, v.val[0]);
            vst1q_u8(out + 16, v.val[1]);
        }
    }
    return k;
}
#endif
