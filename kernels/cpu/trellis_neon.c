/* The kernels of trellis codes with NEON. */
#include "neon.h"
#include "trellis.h"

#if defined(QUIP_ARM)
#define TARGET
#define KERNELS quip_trellis_neon

/* Sums of neighbouring bytes, then of neighbouring pairs, which are added to the constant. */
#define ADD_BYTES(constant, h) vpadalq_u16(constant, vpaddlq_u8(h))
#include "trellis_neon.h"
#endif
