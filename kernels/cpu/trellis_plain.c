/* The kernels of trellis codes in portable vectors, which the compiler translates for any processor. */
#include "trellis.h"

#include <string.h>

#define WIDTH 4
#define TARGET
#define KERNELS quip_trellis_plain
#define UNROLL /* not unrolled: too few registers, and far too much code */
#include "trellis_vectors.h"

static void prepare(trellis_plan *plan) {
    (void)plan;
}

INLINE words states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd) {
    words found;
    for (int l = 0; l < WIDTH; l++) {
        const int begin = 8 * odd + ((lane + l) * plan->pair_bits + 1) / 2;
        uint16_t two[2];
        memcpy(two, bytes + 2 * (begin / 16), sizeof two);
        found[l] = ((uint32_t)two[0] << 16 | two[1]) >> (16 - begin % 16) & 0xffff;
    }
    return found;
}

INLINE words last_states(const trellis_plan *plan, const uint8_t *bytes, int lane, int odd, int16_t first) {
    uint8_t copy[34]; /* at most 32 bytes of this tile, then its first ones */
    memcpy(copy, bytes, 32);
    memcpy(copy + plan->pair_bits + odd, &first, sizeof first);
    return states(plan, copy, lane, odd);
}

INLINE words two_mads(words s) {
    const words g = s * 264435761u + 1013904223u;
    words high;
    for (int l = 0; l < WIDTH; l++) high[l] = (uint32_t)((uint64_t)g[l] * 1664525 >> 32);
    return g + high;
}

INLINE words byte_sums(words h) {
    const words pairs = (h & 0x00ff00ffu) + (h >> 8 & 0x00ff00ffu);
    return ((pairs + (pairs >> 16)) & 0xffffu) + (0x4b000000u + 1024);
}

INLINE words shifted(words w, int count) {
    return w >> (uint32_t)count;
}

INLINE words look_up(const void *table, words index) {
    words found;
    for (int l = 0; l < WIDTH; l++) found[l] = ((const uint32_t *)table)[index[l]];
    return found;
}

INLINE void look_up_pairs(const float *table, const words *index, floats *first, floats *second) {
    float found[2 * WIDTH];
    for (int l = 0; l < WIDTH; l++) memcpy(found + 2 * l, table + 2 * (*index)[l], 2 * sizeof *found);
    memcpy(first, found, sizeof *first);
    memcpy(second, found + WIDTH, sizeof *second);
}

INLINE void widen(words pairs, floats *first, floats *second) {
    float found[2 * WIDTH];
    quip_load(&pairs, QUIP_FLOAT16, 0, found, 2 * WIDTH);
    memcpy(first, found, sizeof *first);
    memcpy(second, found + WIDTH, sizeof *second);
}

INLINE floats part_of_row(const float *weights, const int32_t *source) {
    words index;
    memcpy(&index, source, sizeof index);
    return (floats)look_up(weights, index);
}

#include "trellis_kernels.h"
