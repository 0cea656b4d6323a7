/* A quantized linear layer of many vectors of 16 bits, on processors with AMX: into bundles, products, out of bundles. */
#include "bundles.h"

#if defined(QUIP_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The permission to use tiles, which a program must ask Linux for once (arch_prctl(2)). */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

/* Bits of `cpuid`: products of bfloat16, tiles, products of int8. */
#define NEEDED (1u << 22 | 1u << 24 | 1u << 25)

/* Whether this processor has the instructions, and the system allows them. */
EXPORT int quip_has_amx(void) {
    unsigned a, b, c, d;
    if (quip_cpu_level() != QUIP_AVX512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* y[count][m] of x[count][n], both of this 16-bit type, vectors of x `x_stride` apart; m and n are multiples of 32.
 * t[bundles][words + bytes][LANES]: the transformed inputs in words, int8 if `bytes`, else bfloat16; read if `rotated`, else
 * written. together: vectors whose sums exist at a time, a multiple of 32. z: together * m numbers for the sums.
 * memory: (2 threads LANES + 2) numbers for each input or output, whichever are more, and at least
 * threads * rows * (4 words + MARGIN) bytes. */
EXPORT void quip_linear_many(const quip_layer *layer, const uint16_t *x, uint16_t *y, int type, int64_t count,
                             int64_t x_stride, uint32_t *t, int rotated, int bytes, float *z, int64_t together,
                             float *memory, int64_t rows, int threads) {
    const int64_t n = layer->n, m = layer->m, words = quip_bundle_words(n, bytes), bundle = (words + bytes) * LANES;
    const quip_bundle_call in = {.from = x,
                                 .to = t,
                                 .type = type,
                                 .scale = layer->su,
                                 .scale_type = layer->su_type,
                                 .q = layer->in,
                                 .memory = memory,
                                 .size = n,
                                 .count = count,
                                 .stride = x_stride,
                                 .threads = threads,
                                 .bytes = bytes};
    if (!rotated) quip_to_bundles(&in);
    for (int64_t begin = 0; begin < count; begin += together) {
        const int64_t part = count - begin < together ? count - begin : together;
        const uint32_t *from = t + begin / LANES * bundle;
        const quip_bundle_call out = {.from = z,
                                      .to = y + begin * m,
                                      .type = type,
                                      .scale = layer->sv,
                                      .scale_type = layer->sv_type,
                                      .bias = layer->bias,
                                      .bias_type = layer->bias_type,
                                      .q = layer->out,
                                      .memory = memory,
                                      .size = m,
                                      .count = part,
                                      .stride = m,
                                      .threads = threads,
                                      .units = bytes ? (const float *)(from + words * LANES) : 0,
                                      .units_stride = bundle};
        quip_bundle_products(layer, from, bytes, (part + 2 * LANES - 1) / (2 * LANES) * 2, z, memory, rows, threads);
        quip_from_bundles(&out);
    }
}

#else
EXPORT int quip_has_amx(void) {
    return 0;
}
#endif
