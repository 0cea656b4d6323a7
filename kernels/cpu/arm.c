/* The instructions that a 64-bit ARM processor has, as its operating system tells. */
#include "neon.h"
#include "trellis.h"

#if defined(QUIP_ARM)
#if defined(__linux__)
#include <sys/auxv.h>

#define DOT_PRODUCTS (1ul << 20) /* HWCAP_ASIMDDP, which older headers lack */

static int has_dot_products(void) {
    return (getauxval(AT_HWCAP) & DOT_PRODUCTS) != 0;
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int has_dot_products(void) {
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, 0, 0) && found;
}
#else
static int has_dot_products(void) {
    return 0;
}
#endif

HIDDEN int quip_arm_level(void) {
#if defined(DOTPROD)
    if (has_dot_products()) return QUIP_DOTPROD;
#else
    (void)has_dot_products;
#endif
    return QUIP_NEON;
}

HIDDEN const trellis_kernels *quip_arm_trellis(int level) {
#if defined(DOTPROD)
    if (level == QUIP_DOTPROD) return &quip_trellis_dotprod;
#endif
    (void)level;
    return &quip_trellis_neon;
}

HIDDEN void quip_arm_nibbles(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                             int32_t (*sums)[LANES], int level) {
#if defined(DOTPROD)
    if (level == QUIP_DOTPROD) {
        quip_nibbles_dotprod(tile, fours, planes, stride, columns, sums);
        return;
    }
#endif
    (void)level;
    quip_nibbles_neon(tile, fours, planes, stride, columns, sums);
}

HIDDEN quip_products quip_arm_products(int level) {
#if defined(DOTPROD)
    if (level == QUIP_DOTPROD) return quip_products_dotprod;
#endif
    (void)level;
    return quip_products_neon;
}
#endif
