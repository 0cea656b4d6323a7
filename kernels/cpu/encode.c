/* Nearest points of E8P, with or without a second stage, and rounding of a panel of columns with feedback.
 *
 * Sixteen rows are worked on side by side, one per vector lane: every inner loop runs over lanes and is vectorised by
 * the compiler. On x86-64 the compiler makes one version per instruction set and the loader picks.
 *
 * With a second stage a point is p + scale * q: p is the E8P point nearest to x, and q the nearest to (x - p) / scale in
 * the second codebook. A code is then 32 bits: the code of p, and in the low 8 or 16 bits the code of q.
 */
#include <pthread.h>
#include <string.h>

#include "common.h"
#include "e8_search.h"
#include "e8p_search.h"

static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void make_tables(void) {
    make_e8p_search();
    make_e8_search();
}

INLINE void encode_lanes(const int second, float scale, const lanes_f *x, int32_t *restrict code, lanes_f *point) {
    lanes_f rest[BLOCK], refinement[BLOCK];
    lanes_i low;
    e8p_search(x, code, point);
    if (second == QUIP_NO_STAGE) return;
    const float inverse = 1 / scale;
    for (int i = 0; i < BLOCK; i++) EACH_LANE rest[i][l] = (x[i][l] - point[i][l]) * inverse;
    if (second == QUIP_E8)
        e8_search((const lanes_f *)rest, low, refinement);
    else
        e8p_search((const lanes_f *)rest, low, refinement);
    for (int i = 0; i < BLOCK; i++) EACH_LANE point[i][l] += scale * refinement[i][l];
    EACH_LANE code[l] = (int32_t)(second == QUIP_E8 ? (uint32_t)(int16_t)code[l] << 8 | (uint32_t)low[l]
                                                    : (uint32_t)code[l] << 16 | (uint32_t)low[l]);
}

INLINE void write_code(const int second, void *codes, int64_t at, int32_t code) {
    if (second == QUIP_NO_STAGE)
        ((int16_t *)codes)[at] = (int16_t)code;
    else
        ((int32_t *)codes)[at] = code;
}

typedef struct {
    const float *target, *base, *feedback;
    void *codes;
    float *points, *delta;
    int64_t rows, columns, first, last;
    float scale;
} panel;

/* Rows [first, last) of a panel, sixteen at a time, blocks of columns from the last to the first. */
INLINE void round_rows(const panel *p, const int second) {
    const int64_t columns = p->columns, blocks = columns / BLOCK;
    lanes_f wanted[256], change[BLOCK], point[BLOCK];
    lanes_i code;
    for (int64_t row = p->first; row < p->last; row += LANES) {
        const int count = p->last - row < LANES ? (int)(p->last - row) : LANES;
        for (int64_t c = 0; c < columns; c++) {
            for (int l = 0; l < count; l++) wanted[c][l] = p->target[(row + l) * columns + c];
            for (int l = count; l < LANES; l++) wanted[c][l] = 0;
        }
        for (int64_t block = blocks - 1; block >= 0; block--) {
            const int64_t begin = block * BLOCK;
            encode_lanes(second, p->scale, (const lanes_f *)(wanted + begin), code, point);
            for (int l = 0; l < count; l++) write_code(second, p->codes, (row + l) * blocks + block, code[l]);
            for (int i = 0; i < BLOCK; i++) {
                for (int l = 0; l < count; l++) {
                    const int64_t at = (row + l) * columns + begin + i;
                    p->points[at] = point[i][l];
                    p->delta[at] = change[i][l] = p->base[at] - point[i][l];
                }
                for (int l = count; l < LANES; l++) change[i][l] = 0;
            }
            for (int64_t c = 0; c < begin; c++) {
                lanes_f sum;
                memcpy(sum, wanted[c], sizeof sum);
                for (int i = 0; i < BLOCK; i++) {
                    const float weight = p->feedback[(begin + i) * columns + c];
                    EACH_LANE sum[l] += weight * change[i][l];
                }
                memcpy(wanted[c], sum, sizeof sum);
            }
        }
    }
}

typedef struct {
    const float *x;
    void *codes;
    float *points;
    int64_t first, last;
    float scale;
} batch;

INLINE void encode_vectors(const batch *b, const int second) {
    lanes_f x[BLOCK], point[BLOCK];
    lanes_i code;
    for (int64_t row = b->first; row < b->last; row += LANES) {
        const int count = b->last - row < LANES ? (int)(b->last - row) : LANES;
        for (int i = 0; i < BLOCK; i++) {
            for (int l = 0; l < count; l++) x[i][l] = b->x[(row + l) * BLOCK + i];
            for (int l = count; l < LANES; l++) x[i][l] = 0;
        }
        encode_lanes(second, b->scale, (const lanes_f *)x, code, point);
        for (int l = 0; l < count; l++) {
            write_code(second, b->codes, row + l, code[l]);
            for (int i = 0; i < BLOCK; i++) b->points[(row + l) * BLOCK + i] = point[i][l];
        }
    }
}

/* One function for each second stage, so that the stage is a constant for the compiler. */
#define FOR_STAGE(name, second)                                                                                            \
    FOR_EACH_CPU static void *round_rows_##name(void *argument) {                                                          \
        round_rows(argument, second);                                                                                      \
        return 0;                                                                                                          \
    }                                                                                                                      \
    FOR_EACH_CPU static void *encode_##name(void *argument) {                                                              \
        encode_vectors(argument, second);                                                                                  \
        return 0;                                                                                                          \
    }
FOR_STAGE(none, QUIP_NO_STAGE)
FOR_STAGE(e8, QUIP_E8)
FOR_STAGE(e8p, QUIP_E8P)

#define MOST_THREADS 64

/* Run `work` on each of the arguments, at arguments + i * size, each in its own thread. */
static void share(void *(*work)(void *), void *arguments, size_t size, int parts) {
    pthread_t threads[MOST_THREADS];
    int started[MOST_THREADS];
    for (int i = 1; i < parts; i++)
        started[i] = pthread_create(&threads[i], 0, work, (char *)arguments + (size_t)i * size) == 0;
    work(arguments);
    for (int i = 1; i < parts; i++) {
        if (started[i])
            pthread_join(threads[i], 0);
        else
            work((char *)arguments + (size_t)i * size);
    }
}

static int part_count(int64_t rows, int threads, int64_t least) {
    int64_t parts = rows / least;
    if (parts > threads) parts = threads;
    if (parts > MOST_THREADS) parts = MOST_THREADS;
    return parts < 1 ? 1 : (int)parts;
}

static int64_t part_begin(int64_t rows, int part, int parts) {
    int64_t groups = (rows + LANES - 1) / LANES, begin = groups * part / parts * LANES;
    return begin < rows ? begin : rows;
}

/* codes[n], points[n][8] of x[n][8]. second: QUIP_NO_STAGE (int16 codes; scale has no effect), QUIP_E8 or QUIP_E8P. */
EXPORT void quip_encode(const float *x, int64_t n, int second, float scale, void *codes, float *points, int threads) {
    static void *(*const work[])(void *) = {encode_none, encode_e8, encode_e8p};
    batch parts[MOST_THREADS];
    const int count = part_count(n, threads, 4096);
    pthread_once(&tables_once, make_tables);
    for (int i = 0; i < count; i++)
        parts[i] = (batch){x, codes, points, part_begin(n, i, count), part_begin(n, i + 1, count), scale};
    share(work[second], parts, sizeof *parts, count);
}

/* Round a panel [rows][columns] block by block, from its last eight columns to its first:
 *   x_k = target_k + sum over later blocks j of delta_j feedback[j][k];  point_k = nearest(x_k);
 *   delta_k = base_k - point_k.
 * columns: a multiple of 8, at most 256; feedback [columns][columns]. second, scale: as for quip_encode. Returns 0, or
 * -1 for other sizes. */
EXPORT int quip_round_panel(const float *target, const float *base, const float *feedback, int64_t rows, int64_t columns,
                            int second, float scale, void *codes, float *points, float *delta, int threads) {
    static void *(*const work[])(void *) = {round_rows_none, round_rows_e8, round_rows_e8p};
    panel parts[MOST_THREADS];
    const int count = part_count(rows, threads, 2 * LANES);
    if (columns % BLOCK || columns < BLOCK || columns > 256 || rows < 0) return -1;
    pthread_once(&tables_once, make_tables);
    for (int i = 0; i < count; i++)
        parts[i] = (panel){target,
                           base,
                           feedback,
                           codes,
                           points,
                           delta,
                           rows,
                           columns,
                           part_begin(rows, i, count),
                           part_begin(rows, i + 1, count),
                           scale};
    share(work[second], parts, sizeof *parts, count);
    return 0;
}
