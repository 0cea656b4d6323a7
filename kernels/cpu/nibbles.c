/* Weights of E8P and E8 at four bits each, for processors on which they are multiplied faster than codes.
 *
 * A weight is q = (byte - least) / 2 of its byte 4 w + 31. A tile of sixteen rows is [2 blocks][8][4] bytes: byte [k][r][i] has
 * the weight of row r and column 4 k + i in its lower half, and that of row r + 8 in its upper half. So both halves are
 * multiplied by the same four numbers of a plane, and a register has the sums of eight rows side by side. */
#include <pthread.h>
#include <string.h>

#include "common.h"

#define FOUR 4                   /* columns that are together */
#define STEP (FOUR * LANES / 2)  /* bytes of four columns of a tile */
#define LEAST_E8P 20             /* 4 w + 31 for w = -11/4 */
#define LEAST_E8 23              /* for w = -2 */
#define SLOTS_E8P (1u << 17)     /* of a table of points, twice their number */
#define SLOTS_E8 (1u << 9)
#define STRETCH 64               /* codes of a row that are handled at a time */

HIDDEN int quip_nibble_least(int codebook) {
    return codebook == QUIP_E8P ? LEAST_E8P : LEAST_E8;
}

HIDDEN void quip_nibble_bytes(int codebook, const uint8_t *nibbles, int64_t blocks, int64_t row, int64_t first, int count,
                              uint8_t *bytes) {
    const int64_t lane = row % LANES;
    const uint8_t *from = nibbles + (row / LANES * blocks + first) * 2 * STEP + lane % (LANES / 2) * FOUR;
    const int shift = lane < LANES / 2 ? 0 : 4;
    const uint32_t least = (uint32_t)quip_nibble_least(codebook) * 0x01010101u;
    for (int k = 0; k < 2 * count; k++) {
        uint32_t four;
        memcpy(&four, from + k * STEP, sizeof four);
        four = 2 * (four >> shift & 0x0f0f0f0fu) + least;
        memcpy(bytes + k * FOUR, &four, sizeof four);
    }
}

typedef struct {
    int codebook, failed;
    const void *from;
    void *to;
    int64_t blocks;
} conversion;

/* Tiles [first, last) of codes. */
static void to_nibbles(void *context, int64_t first, int64_t last) {
    const conversion *call = context;
    const uint8_t least = (uint8_t)quip_nibble_least(call->codebook);
    uint8_t low[BLOCK * STRETCH], high[BLOCK * STRETCH];
    for (int64_t tile = first; tile < last; tile++)
        for (int64_t begin = 0; begin < call->blocks; begin += STRETCH) {
            const int count = call->blocks - begin < STRETCH ? (int)(call->blocks - begin) : STRETCH;
            for (int r = 0; r < LANES / 2; r++) {
                uint8_t *to = (uint8_t *)call->to + (tile * call->blocks + begin) * 2 * STEP + r * FOUR;
                const int64_t row = tile * LANES + r;
                quip_expand(call->codebook, call->from, row * call->blocks + begin, count, low);
                quip_expand(call->codebook, call->from, (row + LANES / 2) * call->blocks + begin, count, high);
                for (int i = 0; i < BLOCK * count; i++)
                    to[i / FOUR * STEP + i % FOUR] = (uint8_t)((low[i] - least) >> 1 |
                                                               (uint8_t)(high[i] - least) >> 1 << 4);
            }
        }
}

/* out[rows / 16][2 blocks][8][4] of codes[rows][blocks], of E8P or E8; rows: a multiple of 16. */
EXPORT void quip_to_nibbles(int codebook, const void *codes, int64_t rows, int64_t blocks, uint8_t *out, int threads) {
    conversion call = {codebook, 0, codes, out, blocks};
    quip_e8p_make_tables();
    quip_e8_make_tables();
    quip_parallel(to_nibbles, &call, rows / LANES, (1 << 12) / (blocks + 1) + 1, threads);
}

/* Points by their eight bytes: a slot has the bytes, and the code; a point is in the first free slot from its place on. */
typedef struct {
    uint64_t bytes;
    uint32_t code;
} slot;
static slot slots_e8p[SLOTS_E8P], slots_e8[SLOTS_E8];

/* The slot of these bytes among `count`, a power of two: their own, or a free one. No point is all zeros. */
static slot *find(slot *slots, uint32_t count, uint64_t bytes) {
    uint32_t place = (uint32_t)(bytes * 0x9e3779b97f4a7c15ull >> 40) & (count - 1);
    while (slots[place].bytes && slots[place].bytes != bytes) place = (place + 1) & (count - 1);
    return slots + place;
}

static void make_slots(void) {
    for (uint32_t code = 0; code < 65536; code++) {
        const uint64_t bytes = quip_e8p_pattern[code >> 8] ^ quip_e8p_signs[code & 255];
        *find(slots_e8p, SLOTS_E8P, bytes) = (slot){bytes, code};
    }
    for (uint32_t code = 0; code < 256; code++)
        *find(slots_e8, SLOTS_E8, quip_e8_points[code]) = (slot){quip_e8_points[code], code};
}

/* Rows [first, last) of codes. */
static void from_nibbles(void *context, int64_t first, int64_t last) {
    conversion *call = context;
    const int is_e8p = call->codebook == QUIP_E8P;
    uint8_t bytes[BLOCK * STRETCH];
    for (int64_t row = first; row < last; row++)
        for (int64_t begin = 0; begin < call->blocks; begin += STRETCH) {
            const int count = call->blocks - begin < STRETCH ? (int)(call->blocks - begin) : STRETCH;
            quip_nibble_bytes(call->codebook, call->from, call->blocks, row, begin, count, bytes);
            for (int k = 0; k < count; k++) {
                uint64_t eight;
                memcpy(&eight, bytes + BLOCK * k, sizeof eight);
                const slot *found = is_e8p ? find(slots_e8p, SLOTS_E8P, eight) : find(slots_e8, SLOTS_E8, eight);
                if (!found->bytes) __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
                const int64_t at = row * call->blocks + begin + k;
                if (is_e8p)
                    ((uint16_t *)call->to)[at] = (uint16_t)found->code;
                else
                    ((uint8_t *)call->to)[at] = (uint8_t)found->code;
            }
        }
}

/* The inverse of quip_to_nibbles. Returns 0, or -1 if a block is not a point of the codebook. */
EXPORT int quip_from_nibbles(int codebook, const uint8_t *nibbles, int64_t rows, int64_t blocks, void *codes, int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    conversion call = {codebook, 0, nibbles, codes, blocks};
    quip_e8p_make_tables();
    quip_e8_make_tables();
    pthread_once(&once, make_slots);
    quip_parallel(from_nibbles, &call, rows, (1 << 12) / (blocks + 1) + 1, threads);
    return call.failed ? -1 : 0;
}

FOR_EACH_CPU static void multiply_plain(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride,
                                        int columns, int32_t (*sums)[LANES]) {
    for (int c = 0; c < columns; c++) {
        int32_t sum[LANES] = {0};
        for (int64_t k = 0; k < fours; k++)
            for (int r = 0; r < LANES / 2; r++)
                for (int i = 0; i < FOUR; i++) {
                    const int byte = tile[k * STEP + r * FOUR + i], x = planes[c * stride + k * FOUR + i];
                    sum[r] += (byte & 15) * x;
                    sum[r + LANES / 2] += (byte >> 4) * x;
                }
        for (int r = 0; r < LANES; r++) sums[c][r] = 2 * sum[r];
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define MOST_TOGETHER 3 /* columns whose sums stay in registers */
#define RUN 8           /* steps whose sums fit into 16 bits: 8 * 2 * 15 * 128 < 2^15 */

/* sums of `steps` steps of either half of a tile, in 16 bits */
AVX2 INLINE void add_steps(const uint8_t *tile, const int8_t *x, int64_t stride, int columns, int steps,
                           __m256i (*sum)[2]) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int c = 0; c < columns; c++) sum[c][0] = sum[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int k = 0; k < steps; k++) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(tile + k * STEP));
        const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        for (int c = 0; c < columns; c++) {
            int32_t four;
            memcpy(&four, x + c * stride + k * FOUR, sizeof four);
            const __m256i by = _mm256_set1_epi32(four);
            sum[c][0] = _mm256_add_epi16(sum[c][0], _mm256_maddubs_epi16(low, by));
            sum[c][1] = _mm256_add_epi16(sum[c][1], _mm256_maddubs_epi16(high, by));
        }
    }
}

AVX2 INLINE void multiply_together(const uint8_t *tile, int64_t fours, const int8_t *x, int64_t stride, int columns,
                                   int32_t (*sums)[LANES]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i total[MOST_TOGETHER][2], part[MOST_TOGETHER][2];
    for (int c = 0; c < columns; c++) total[c][0] = total[c][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < fours; k += RUN) {
        if (fours - k >= RUN)
            add_steps(tile + k * STEP, x + k * FOUR, stride, columns, RUN, part);
        else
            add_steps(tile + k * STEP, x + k * FOUR, stride, columns, (int)(fours - k), part);
        for (int c = 0; c < columns; c++)
            for (int h = 0; h < 2; h++) total[c][h] = _mm256_add_epi32(total[c][h], _mm256_madd_epi16(part[c][h], ones));
    }
    for (int c = 0; c < columns; c++)
        for (int h = 0; h < 2; h++)
            _mm256_storeu_si256((__m256i *)(sums[c] + h * LANES / 2), _mm256_slli_epi32(total[c][h], 1));
}

AVX2 static void multiply_avx2(const uint8_t *tile, int64_t fours, const int8_t *planes, int64_t stride, int columns,
                               int32_t (*sums)[LANES]) {
    int c = 0;
    for (; c + MOST_TOGETHER <= columns; c += MOST_TOGETHER)
        multiply_together(tile, fours, planes + c * stride, stride, MOST_TOGETHER, sums + c);
    if (columns - c == 2)
        multiply_together(tile, fours, planes + c * stride, stride, 2, sums + c);
    else if (columns - c == 1)
        multiply_together(tile, fours, planes + c * stride, stride, 1, sums + c);
}
#endif

HIDDEN void quip_products_nibbles(const uint8_t *tile, int64_t blocks, const int8_t *planes, int64_t stride, int columns,
                                  int32_t (*sums)[LANES], int level) {
#if defined(__x86_64__)
    if (level >= QUIP_AVX2) {
        multiply_avx2(tile, 2 * blocks, planes, stride, columns, sums);
        return;
    }
#elif defined(QUIP_ARM)
    if (level >= QUIP_NEON) {
        quip_arm_nibbles(tile, 2 * blocks, planes, stride, columns, sums, level);
        return;
    }
#endif
    (void)level;
    multiply_plain(tile, 2 * blocks, planes, stride, columns, sums);
}
