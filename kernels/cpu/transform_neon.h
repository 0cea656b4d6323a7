/* The last four stages of a Walsh-Hadamard transform with NEON: sixteen neighbours stay in four registers. */
#include "neon.h"

/* Stages of neighbours 1 and 2 apart, of two vectors. */
INLINE void within_vectors(float32x4_t *p, float32x4_t *q) {
    const float32x4_t even = vtrn1q_f32(*p, *q), odd = vtrn2q_f32(*p, *q);
    /* entries 0 and 2 belong to p, the others to q */
    const float64x2_t sum = vreinterpretq_f64_f32(vaddq_f32(even, odd));
    const float64x2_t difference = vreinterpretq_f64_f32(vsubq_f32(even, odd));
    const float32x4_t front = vreinterpretq_f32_f64(vtrn1q_f64(sum, difference));
    const float32x4_t back = vreinterpretq_f32_f64(vtrn2q_f64(sum, difference));
    const float32x4_t first = vaddq_f32(front, back), second = vsubq_f32(front, back);
    *p = vuzp1q_f32(first, second);
    *q = vuzp2q_f32(first, second);
}

/* Sylvester's matrix of order 16 times each 16 neighbours, times scale. */
INLINE void multiply_sixteens(float *restrict x, int64_t size, float scale) {
    for (int64_t b = 0; b < size; b += LANES) {
        float32x4_t v[4];
        for (int i = 0; i < 4; i++) v[i] = vmulq_n_f32(vld1q_f32(x + b + 4 * i), scale);
        const float32x4_t s = vaddq_f32(v[0], v[2]), t = vaddq_f32(v[1], v[3]);
        const float32x4_t u = vsubq_f32(v[0], v[2]), w = vsubq_f32(v[1], v[3]);
        v[0] = vaddq_f32(s, t);
        v[1] = vsubq_f32(s, t);
        v[2] = vaddq_f32(u, w);
        v[3] = vsubq_f32(u, w);
        within_vectors(v, v + 1);
        within_vectors(v + 2, v + 3);
        for (int i = 0; i < 4; i++) vst1q_f32(x + b + 4 * i, v[i]);
    }
}
