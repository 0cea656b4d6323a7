/* float32, bfloat16 and float16 in memory, float32 in between. Rounding is to nearest, ties to even. */
#include <string.h>

#include "common.h"

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_half(uint16_t half) {
    /* The exponent is rebased by a multiplication, which is right for subnormal numbers too. */
    const uint32_t magnitude = bits_of(float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f);
    const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return float_of(magnitude | special | (uint32_t)(half & 0x8000) << 16);
}

INLINE uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    /* Below 2^-14 an addition aligns the bits so that the processor rounds where the subnormal number ends. */
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t half = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? small : normal;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

FOR_EACH_CPU HIDDEN void quip_load(const void *from, int type, int64_t offset, float *restrict to, int64_t count) {
    if (type == QUIP_FLOAT32) {
        memcpy(to, (const float *)from + offset, (size_t)count * sizeof *to);
        return;
    }
    const uint16_t *restrict values = (const uint16_t *)from + offset;
    if (type == QUIP_BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)values[i] << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_half(values[i]);
}

FOR_EACH_CPU HIDDEN void quip_store(const float *restrict from, void *to, int type, int64_t offset, int64_t count) {
    if (type == QUIP_FLOAT32) {
        memcpy((float *)to + offset, from, (size_t)count * sizeof *from);
        return;
    }
    uint16_t *restrict values = (uint16_t *)to + offset;
    if (type == QUIP_BFLOAT16)
        for (int64_t i = 0; i < count; i++) values[i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) values[i] = to_half(from[i]);
}
