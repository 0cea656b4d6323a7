/* Numbers of sixteen rows, computed side by side. */
#ifndef QUIP_LANES_H
#define QUIP_LANES_H

#include "common.h"

typedef float lanes_f[LANES] __attribute__((aligned(64)));
typedef int32_t lanes_i[LANES] __attribute__((aligned(64)));

#endif
