/* A quantized linear layer of many bfloat16 vectors, on processors with AMX: into bundles, products, out of bundles. */
#include "bundles.h"

#if defined(QUIP_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What a program must ask Linux for before it may use tiles, once (arch_prctl(2)). */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

/* Whether this processor has the instructions, and the system lets us use them. */
EXPORT int quip_has_amx(void) {
    unsigned a, b, c, d;
    if (quip_cpu_level() != QUIP_AVX512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* y[count][m] of x[count][n], both bfloat16, vectors of x `x_stride` apart; m and n are multiples of 32. Between the two
 * transforms are bfloat16 inputs, t[bundles][n / 2][LANES], which are read if `rotated` and else written, and float32 sums.
 * together: vectors that there are sums of at a time, a multiple of 32. z: together * m numbers for them. memory: (2 threads
 * LANES + 2) numbers for each input or output, whichever are more, and at least threads * rows * (n + MARGIN) of 16 bits. */
EXPORT void quip_linear_many(const quip_layer *layer, const uint16_t *x, uint16_t *y, int64_t count, int64_t x_stride,
                             uint32_t *t, int rotated, float *z, int64_t together, float *memory, int64_t rows, int threads) {
    const int64_t n = layer->n, m = layer->m;
    const quip_bundle_call in = {x, t, layer->su, 0, layer->in, memory, n, count, x_stride, layer->su_type, 0, threads};
    if (!rotated) quip_to_bundles(&in);
    for (int64_t begin = 0; begin < count; begin += together) {
        const int64_t part = count - begin < together ? count - begin : together;
        const quip_bundle_call out = {z, y + begin * m, layer->sv, layer->bias, layer->out, memory, m, part, m,
                                      layer->sv_type, layer->bias_type, threads};
        quip_bundle_products(layer, t + begin * n / 2, (part + 2 * LANES - 1) / (2 * LANES) * 2, z, memory, rows, threads);
        quip_from_bundles(&out);
    }
}

#else
EXPORT int quip_has_amx(void) { return 0; }
#endif
