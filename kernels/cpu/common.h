/* Declarations shared by the C sources of this library. */
#ifndef QUIP_COMMON_H
#define QUIP_COMMON_H

#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#define HIDDEN
#else
#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#endif

/* 64-bit ARM, where NEON is always there. */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define QUIP_ARM
#endif

/* The compiler makes one version for each instruction set, and the loader picks one. */
#if !defined(QUIP_ONE_VERSION) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

#define LANES 16
#define BLOCK 8 /* weights of one code */
#define EACH_LANE _Pragma("omp simd") for (int l = 0; l < LANES; l++)

/* Second stages after E8P, by their number: none, E8 with one byte for a block, or E8P again. */
enum { QUIP_NO_STAGE, QUIP_E8, QUIP_E8P };

/* Stages of a layer whose weights have four bits each, as nibbles.c describes them, instead of codes. */
enum { QUIP_FIRST = 1, QUIP_SECOND = 2 };

/* threads.c: body(context, first, last) for parts of [0, count), in steps of `grain`, on at most `threads` threads. */
typedef void (*quip_body)(void *context, int64_t first, int64_t last);
HIDDEN void quip_parallel(quip_body body, void *context, int64_t count, int64_t grain, int threads);

/* convert.c: the floating types that tensors may have. */
enum { QUIP_FLOAT32, QUIP_BFLOAT16, QUIP_FLOAT16 };
HIDDEN void quip_load(const void *from, int type, int64_t offset, float *to, int64_t count);
HIDDEN void quip_store(const float *from, void *to, int type, int64_t offset, int64_t count);

/* transform.c: an orthogonal matrix, the Kronecker product of dense factors and a Sylvester matrix (the last factor). */
#define MOST_FACTORS 8
typedef struct {
    int64_t size, count, power;         /* the product of all orders; of dense factors; order of the Sylvester part */
    int64_t orders[MOST_FACTORS];
    const float *factors[MOST_FACTORS]; /* [order][order], row-major */
    const float *transposed[MOST_FACTORS];
    /* For a factor whose entries have one magnitude, else null: see multiply_signs in bundles.c. */
    const uint16_t *signs[MOST_FACTORS], *signs_transposed[MOST_FACTORS];
} quip_transform;
/* A linear layer of E8P codes. */
typedef struct {
    const void *codes,
        *residual;   /* [m][ceil(n / 8)], of E8P and of the second stage; null for none. Or nibbles, see below */
    const void *su, *sv, *bias;     /* [n], [m], [m]; null for none */
    const quip_transform *in, *out; /* of size n and m; null for none */
    int64_t n, m;
    double residual_scale;
    int32_t su_type, sv_type, bias_type, second; /* second: QUIP_NO_STAGE, QUIP_E8 or QUIP_E8P */
    int32_t nibbles; /* the stages that are in nibbles: QUIP_FIRST, QUIP_SECOND, their sum, or 0 */
} quip_layer;

/* Q x, or its transpose times x: x [size] is overwritten, as is scratch [size]; returns the one that holds the result. */
HIDDEN float *quip_apply(const quip_transform *q, int transpose, float *x, float *scratch);
/* The same for `count` consecutive vectors, which is faster than one by one. */
HIDDEN float *quip_apply_many(const quip_transform *q, int transpose, float *x, float *scratch, int64_t count);

/* vectors.c */
HIDDEN void *quip_get_memory(int64_t bytes); /* aligned to 64 bytes, to be freed; null if there is not enough */
HIDDEN void quip_scale_vector(float *x, const float *by, int64_t n);
HIDDEN void quip_add_vector(float *x, const float *other, int64_t n);

/* y = after * Q( before * x ) + bias for many vectors, or with the transpose of Q. Returns 0, -2 without enough memory. */
typedef struct {
    const void *x;
    void *y;
    const void *before, *after, *bias; /* null for none */
    const quip_transform *q;
    int64_t count, x_stride;
    int32_t x_type, y_type, before_type, after_type, bias_type, transpose, threads, failed;
    float *vectors[3];
} quip_transform_call;
EXPORT int quip_transform_vectors(quip_transform_call *call);

/* A weight w of any codebook here is stored as the byte 4 w + 31. */
#define BYTE_OFFSET 31

/* e8p_tables.c. The byte is the exclusive or of one that depends on the high byte of a code and one that depends on the
 * low byte. */
#define TRIPLES 29
/* Coordinates that are 1/2 in the patterns of norm 12. */
#define E8P_TRIPLES                                                                                                        \
    "123", "023", "013", "012", "367", "357", "347", "356", "346", "345", "267", "257", "247", "256", "246", "245", "167", \
        "157", "147", "156", "146", "045", "067", "057", "047", "056", "046", "014", "237"
extern HIDDEN const char quip_e8p_triples[TRIPLES][4];
extern HIDDEN uint64_t quip_e8p_pattern[256], quip_e8p_signs[256]; /* eight bytes, coordinate 0 at the lowest address */
extern HIDDEN uint8_t quip_e8p_low[256], quip_e8p_high[256];       /* |w| of coordinates 0-3 and 4-7, two bits each */
HIDDEN void quip_e8p_make_tables(void);

/* e8_tables.c: the bytes of a code, coordinate 0 at the lowest address; and the bytes of one coordinate for all codes. */
extern HIDDEN uint64_t quip_e8_points[256];
extern HIDDEN uint8_t quip_e8_coordinates[BLOCK][256];
HIDDEN void quip_e8_make_tables(void);

/* decode.c: codes to decode. */
typedef struct {
    const void *codes;
    const void *residual; /* codes of a second stage, null for none */
    int64_t blocks, columns, stride; /* of a row: codes, weights, and numbers from one row of `out` to the next */
    int64_t origin;                  /* the row that `out` begins with */
    int second, type, level, nibbles; /* nibbles: as of quip_layer; rows are then a multiple of 16 */
    float scale; /* of the second stage */
    void *out;
    uint16_t values[2 * LANES]; /* the 16 bits of a weight, by half its byte modulo 32 */
} quip_grid;
HIDDEN quip_grid quip_make_grid(const void *codes, const void *residual, int second, float scale, int64_t columns,
                                void *out, int type, int level);
HIDDEN void quip_decode_rows(void *grid, int64_t first, int64_t last); /* a quip_body */

/* products*.c: sums[c][r] = sum over i of (4 w_ri + 31) plane_c[i], for up to 16 rows and any number of planes.
 * codebook: QUIP_E8 (uint8 codes) or QUIP_E8P (int16).
 * planes: int8, plane c begins at c * stride; stride is a multiple of 256, completed with zeros. */
typedef void (*quip_products)(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                              int64_t stride, int columns, int32_t (*sums)[LANES]);
/* products.c: the bytes 4 w + 31 of codes [first, first + count). */
HIDDEN void quip_expand(int codebook, const void *codes, int64_t first, int count, uint8_t *bytes);
/* nibbles.c: the byte of q = 0; as quip_expand, for a row; and sums as above of q for a tile, times 2. */
HIDDEN int quip_nibble_least(int codebook);
HIDDEN void quip_nibble_bytes(int codebook, const uint8_t *nibbles, int64_t blocks, int64_t row, int64_t first, int count,
                              uint8_t *bytes);
HIDDEN void quip_products_nibbles(const uint8_t *tile, int64_t blocks, const int8_t *planes, int64_t stride, int columns,
                                  int32_t (*sums)[LANES], int level);
/* Instruction sets, with numbers for each kind of processor. */
enum { QUIP_PLAIN, QUIP_AVX2, QUIP_AVX512, QUIP_NEON = 1, QUIP_DOTPROD };
EXPORT int quip_cpu_level(void); /* linear.c */
HIDDEN void quip_products_plain(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                int64_t stride, int columns, int32_t (*sums)[LANES]);
#if defined(__x86_64__)
HIDDEN void quip_products_avx2(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                               int64_t stride, int columns, int32_t (*sums)[LANES]);
HIDDEN void quip_products_avx512(int codebook, const void *codes, int64_t rows, int64_t blocks, const int8_t *planes,
                                 int64_t stride, int columns, int32_t (*sums)[LANES]);
/* The order of a plane that quip_products_avx512 reads, in place. */
HIDDEN void quip_order_avx512(int8_t *plane, int64_t stride);
#endif
#if defined(QUIP_ARM)
HIDDEN int quip_arm_level(void); /* arm.c */
HIDDEN quip_products quip_arm_products(int level);
/* As quip_products_nibbles, for 4 * fours columns. */
HIDDEN void quip_arm_nibbles(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                             int32_t (*sums)[LANES], int level);
/* decode_neon.c: codes of a row from the first on; returns how many were decoded. */
HIDDEN int64_t quip_decode_neon(const quip_grid *g, const int16_t *codes, int64_t row);
#endif

#endif
