/* The steps of the trellis encoder in portable vectors, which the compiler translates for any processor. */
#include "viterbi.h"

#define WIDTH 8
#define TARGET
#define KERNELS quip_viterbi_plain
#define UNROLL
typedef uint16_t costs __attribute__((vector_size(2 * WIDTH)));
typedef int16_t numbers __attribute__((vector_size(2 * WIDTH)));
typedef costs flags;

INLINE costs pattern_for(int old) {
    return (costs){0} + (uint16_t)old;
}

INLINE costs expand(const uint16_t *before, int old, costs pattern) {
    costs found;
    (void)old;
    for (int l = 0; l < WIDTH; l++) found[l] = before[l >> pattern[0]];
    return found;
}

INLINE flags keeps(costs a, costs b) {
    return (flags)(a <= b);
}

INLINE costs choose(flags yes, costs a, costs b) {
    return b ^ ((a ^ b) & yes);
}

INLINE costs least(costs a, costs b) {
    return choose(keeps(a, b), a, b);
}

INLINE costs add(costs a, costs b) {
    const costs sum = a + b;
    return sum | (costs)(sum < a);
}

/* |values - x| is exact in 16 bits without sign. */
INLINE costs distance(costs values, costs x, int doublings) {
    const flags below = (flags)((numbers)values < (numbers)x);
    const costs difference = choose(below, x - values, values - x), zero = {0};
    /* the largest of those with a sign: 32768 below x, but 32767 above it */
    const costs error = least(difference, zero + (uint16_t)0x7fff - below);
    const costs usual = least(error, zero + (uint16_t)((1 << 15) >> doublings)), q = usual << (uint16_t)doublings;
    costs high;
    for (int l = 0; l < WIDTH; l++) high[l] = (uint16_t)((uint32_t)q[l] * q[l] >> 16);
    return high + ((error - usual) >> 2);
}

INLINE uint32_t bits_of(const flags *f) {
    uint32_t bits = 0;
    for (int p = 0; p < BLOCK_EDGES / WIDTH; p++)
        for (int l = 0; l < WIDTH; l++) bits |= (uint32_t)(f[p][l] & 1) << (p * WIDTH + l);
    return bits;
}

INLINE void store_bytes(uint8_t *to, const costs *found) {
    for (int i = 0; i < BLOCK_EDGES; i++) to[i] = (uint8_t)found[i / WIDTH][i % WIDTH];
}

#include "viterbi_kernels.h"
