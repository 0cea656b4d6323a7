/* The kernels of trellis codes with NEON and the dot products of bytes. */
#include "neon.h"
#include "trellis.h"

#if defined(DOTPROD)
#define TARGET DOTPROD
#define KERNELS quip_trellis_dotprod
#define ADD_BYTES(constant, h) vdotq_u32(constant, h, vdupq_n_u8(1))
#include "trellis_neon.h"
#endif
