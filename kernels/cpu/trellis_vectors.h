/* Vectors of WIDTH words of 32 bits, for arithmetic with the operators of C (an extension of GCC and Clang). */
#include <stdint.h>

typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t shorts __attribute__((vector_size(4 * WIDTH)));
typedef float floats __attribute__((vector_size(4 * WIDTH)));
