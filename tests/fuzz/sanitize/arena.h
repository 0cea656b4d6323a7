/* What one call of the driver needs: random numbers, and memory of exactly the size that it asks for. */
#ifndef ARENA_H
#define ARENA_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trellis.h"

#define MOST_KEPT 64
#define SAME 0
#define NEARLY 2e-5

static int differences;
/* What one call needs: its random numbers, and its memory, which is freed as a whole. */
typedef struct {
    uint64_t state;
    void *kept[MOST_KEPT];
    int count;
} arena;

static uint32_t random_bits(arena *a) {
    a->state ^= a->state << 13, a->state ^= a->state >> 7, a->state ^= a->state << 17;
    return (uint32_t)(a->state >> 16);
}
static int64_t below(arena *a, int64_t n) {
    return random_bits(a) % n;
}
static int one_in(arena *a, int n) {
    return below(a, n) == 0;
}

static void *exact(arena *a, int64_t bytes) { /* memory of exactly this size */
    void *result = malloc((size_t)bytes);
    if ((bytes && !result) || a->count == MOST_KEPT) abort();
    return a->kept[a->count++] = result;
}
static void release(arena *a) {
    while (a->count) free(a->kept[--a->count]);
}
static void *codes_of(arena *a, int64_t bytes) {
    uint8_t *result = exact(a, bytes);
    for (int64_t i = 0; i < bytes; i++) result[i] = (uint8_t)random_bits(a);
    return result;
}
static int64_t width(int type) {
    return type == QUIP_FLOAT32 ? 4 : 2;
}
/* Numbers around 1 of a floating type. `odd`: now and then some are infinite, NaN, huge, tiny or zero. */
static void *numbers(arena *a, int64_t n, int type, int odd) {
    void *result = exact(a, n * width(type));
    const int kind = odd ? (int)below(a, 16) : 15;
    const int64_t at = n ? below(a, n) : 0;
    for (int64_t i = 0; i < n; i++) {
        float x = (float)(int32_t)random_bits(a) * 0x1p-30f;
        if (kind == 0 && i == at) x = NAN;
        if (kind == 1 && i == at) x = -INFINITY;
        if (kind == 2) x *= 1e37f;
        if (kind == 3) x *= 1e-41f;
        if (kind == 4) x = 0;
        quip_store(&x, result, type, i, 1);
    }
    return result;
}
static void *maybe_numbers(arena *a, int64_t n, int type) {
    return one_in(a, 3) ? 0 : numbers(a, n, type, 0);
}

/* A size up to `most`: half of the time one next to where loops and vectors end. */
static int64_t some(arena *a, int64_t most) {
    static const int64_t edges[] = {1,  7,  8,   9,   15,  16,  17,  31,  32,   33,  63,
                                    64, 65, 127, 128, 129, 255, 256, 257, 2048, 2049};
    const int64_t edge = edges[below(a, sizeof edges / sizeof *edges)];
    return one_in(a, 2) && edge <= most ? edge : 1 + below(a, most);
}

/* An orthogonal transform of this size, with dense factors and a power of two; its factors are any numbers. */
static quip_transform *transform_of(arena *a, int64_t size) {
    quip_transform *q = exact(a, sizeof *q);
    *q = (quip_transform){.size = size, .power = 1};
    int64_t rest = size;
    while (rest % 2 == 0 && !one_in(a, 6)) rest /= 2, q->power *= 2;
    for (int64_t d = 2; rest > 1 && q->count < 3; d++) {
        const int64_t order = q->count == 2 || d * d > rest ? rest : d;
        if (rest % order) continue;
        const int64_t f = q->count++;
        q->orders[f] = order, rest /= order;
        q->factors[f] = numbers(a, order * order, QUIP_FLOAT32, 0);
        q->transposed[f] = numbers(a, order * order, QUIP_FLOAT32, 0);
    }
    return q;
}

static void expect(int good, const char *what, int64_t m, int64_t n, int64_t detail) {
    if (good) return;
    fprintf(stderr, "DIFFERENCE in %s: m %ld, n %ld, %ld\n", what, (long)m, (long)n, (long)detail);
    __atomic_store_n(&differences, 1, __ATOMIC_RELAXED);
}
/* Whether two results are the same, or differ by no more than this part of the largest. Where they are not finite, both are
 * not: sums in another order may be infinite in one place and NaN in the other. */
static int agree(const void *x, const void *y, int64_t n, int type, double tolerance) {
    double most = 0;
    float u, v;
    for (int64_t i = 0; i < n; i++) {
        quip_load(x, type, i, &u, 1);
        if (isfinite(u) && fabsf(u) > most) most = fabsf(u);
    }
    for (int64_t i = 0; i < n; i++) {
        quip_load(x, type, i, &u, 1), quip_load(y, type, i, &v, 1);
        if (!(u == v || (!isfinite(u) && !isfinite(v)) || fabs((double)u - v) <= tolerance * most)) return 0;
    }
    return 1;
}
static double tolerance_of(int type) {
    return type == QUIP_FLOAT32 ? NEARLY : 1e-2;
}

#endif
