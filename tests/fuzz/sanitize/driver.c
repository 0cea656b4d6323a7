/* Calls every entry point of kernels/cpu with random sizes and buffers of exactly the size that the description asks for, so
 * that AddressSanitizer sees a read or a write of one byte too many.
 *
 *     driver SEED CALLS THREADS [fork]
 *
 * THREADS > 1: that many threads call at once, for ThreadSanitizer. fork: a child computes as well, after its parent. Every
 * instruction set and number of threads must give the same result (of trellis codes, nearly the same); if not, exit code 1. */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bundles.h"
#undef MARGIN
#include "arena.h"

EXPORT int quip_linear(const quip_layer *, const void *, void *, int64_t, int64_t, int, int, int, int, int);
EXPORT void quip_decode(const void *, const void *, int, float, int64_t, int64_t, void *, int, int, int, int);
EXPORT void quip_to_nibbles(int, const void *, int64_t, int64_t, uint8_t *, int);
EXPORT int quip_from_nibbles(int, const uint8_t *, int64_t, int64_t, void *, int);
EXPORT int quip_trellis_linear(const quip_trellis *, const void *, void *, int64_t, int64_t, int, int, int, int);
EXPORT int quip_trellis_decode(const quip_trellis *, void *, int, int, int);
EXPORT int quip_trellis_expand(const quip_trellis *, void *, int, int);
EXPORT void quip_encode(const float *, int64_t, int, float, void *, float *, int);
EXPORT int quip_round_panel(const float *, const float *, const float *, int64_t, int64_t, int, float, void *, float *,
                            float *, int);
EXPORT int quip_round_panel_scalar(const float *, const float *, const float *, int64_t, int64_t, int, uint8_t *, float *,
                                   float *, int);
EXPORT int quip_viterbi(const int16_t *, int64_t, const int16_t *, int, int, int, int, int, int, int16_t *, int, int);
EXPORT void quip_share_threads(void *);
EXPORT void quip_limit_threads(int);
EXPORT int quip_has_amx(void);
#if defined(QUIP_AMX)
EXPORT void quip_linear_many(const quip_layer *, const uint16_t *, uint16_t *, int, int64_t, int64_t, uint32_t *, int, int,
                             float *, int64_t, float *, int64_t, int);
#endif

#define BF16_MARGIN 64 /* bytes between decoded rows, as bundles.h has it */

static const int THREADS[2] = {1, 4};

/* A layer of E8P codes with what surrounds them. */
static quip_layer layer_of(arena *a, int64_t m, int64_t n, int second, int wide) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    quip_layer l = {.n = n, .m = m, .second = second, .residual_scale = 0.3};
    l.su_type = (int)below(a, 3), l.sv_type = (int)below(a, 3), l.bias_type = (int)below(a, 3);
    l.codes = codes_of(a, 2 * m * blocks);
    if (second) l.residual = codes_of(a, m * blocks * (second == QUIP_E8P ? 2 : 1));
    l.su = maybe_numbers(a, n, l.su_type), l.sv = maybe_numbers(a, m, l.sv_type), l.bias = maybe_numbers(a, m, l.bias_type);
    if (wide && !one_in(a, 3)) l.in = transform_of(a, n), l.out = transform_of(a, m);
    return l;
}

/* The same with some stages in nibbles, for rows in whole tiles. */
static quip_layer expanded(arena *a, const quip_layer *codes) {
    const int64_t m = codes->m, blocks = (codes->n + BLOCK - 1) / BLOCK;
    quip_layer l = *codes;
    l.nibbles = m % LANES ? 0 : QUIP_FIRST * one_in(a, 2) + QUIP_SECOND * (l.second && one_in(a, 2));
    for (int stage = QUIP_FIRST; stage <= QUIP_SECOND; stage++) {
        const int book = stage == QUIP_FIRST ? QUIP_E8P : l.second;
        const void **place = stage == QUIP_FIRST ? &l.codes : &l.residual, *given = *place;
        if (!(l.nibbles & stage)) continue;
        uint8_t *made = exact(a, m * blocks * BLOCK / 2);
        quip_to_nibbles(book, given, m, blocks, made, THREADS[below(a, 2)]);
        const int64_t size = m * blocks * (book == QUIP_E8P ? 2 : 1);
        char *back = exact(a, size);
        expect(!quip_from_nibbles(book, made, m, blocks, back, THREADS[below(a, 2)]), "quip_from_nibbles", m, blocks, book);
        expect(!memcmp(back, given, (size_t)size), "codes of nibbles", m, blocks, book);
        *place = made;
    }
    return l;
}

static void call_linear(arena *a) {
    const int64_t n = some(a, one_in(a, 2) ? 600 : 2100), count = one_in(a, 4) ? some(a, 20) : some(a, 4);
    const int64_t m = one_in(a, 2) ? LANES * some(a, 8) : some(a, 140);
    const int x_type = (int)below(a, 3), y_type = (int)below(a, 3), planes = 1 + (int)below(a, 3);
    const quip_layer l = layer_of(a, m, n, (int)below(a, 3), n <= 600), nibbles = expanded(a, &l);
    const int64_t stride = n + below(a, 5);
    const void *x = numbers(a, (count - 1) * stride + n, x_type, 1);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            void *y = exact(a, count * m * width(y_type));
            const quip_layer *form = t ? &nibbles : &l;
            expect(!quip_linear(form, x, y, count, stride, x_type, y_type, planes, level, THREADS[t]), "quip_linear", m, n,
                   -1);
            expect(!first || agree(first, y, count * m, y_type, SAME), "quip_linear", m, n, 10 * level + THREADS[t]);
            first = first ? first : y;
        }
    expect(quip_linear(&l, x, first, count, stride, x_type, y_type, 4, 0, 1) == -1, "refusal of four planes", m, n, 4);
}

static void call_decode(arena *a) {
    const int64_t n = some(a, 2100), m = one_in(a, 2) ? LANES * some(a, 8) : some(a, 140);
    const int type = (int)below(a, 3), second = (int)below(a, 3);
    const quip_layer l = layer_of(a, m, n, second, 0), nibbles = expanded(a, &l);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            void *w = exact(a, m * n * width(type));
            const quip_layer *form = t ? &nibbles : &l;
            quip_decode(form->codes, form->residual, second, 0.3f, m, n, w, type, form->nibbles, level, THREADS[t]);
            expect(!first || agree(first, w, m * n, type, SAME), "quip_decode", m, n, 10 * level + THREADS[t]);
            first = first ? first : w;
        }
}

/* A layer of trellis codes with any code, order, number of bits and table. */
static quip_trellis trellis_of(arena *a, int64_t m, int64_t n) {
    const int code = (int)below(a, TRELLIS_LUT + 1), tabulated = code >= TRELLIS_HYB;
    quip_trellis w = {.code = code, .pair_bits = 2 + 2 * (int)below(a, MOST_BITS), .order = (int)below(a, 3), .step = 1};
    if (code == TRELLIS_MUL1 && one_in(a, 2)) w.pair_bits = 3 + 2 * (int)below(a, 3);
    w.table_type = (int)below(a, 3);
    if (tabulated) {
        w.step = 1 + (int)below(a, 2);
        w.table_bits = code == TRELLIS_LUT ? 16 : 1 + (int)below(a, one_in(a, 6) ? 15 : 10);
        w.table = numbers(a, ((int64_t)1 << w.table_bits) * w.step, w.table_type, 0);
    }
    w.layer = layer_of(a, m, n, QUIP_NO_STAGE, 1);
    w.layer.codes = codes_of(a, m * n / TILE * w.pair_bits);
    return w;
}

/* The same as records, to multiply the bytes or the codes. */
static quip_trellis records_of(arena *a, const quip_trellis *w, int form) {
    quip_trellis made = *w;
    const int64_t size = w->layer.m / TILE * quip_record_size(w);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++) {
        void *records = exact(a, size);
        expect(!quip_trellis_expand(w, records, level, THREADS[below(a, 2)]), "refusal", w->layer.m, w->layer.n, w->code);
        expect(!first || !memcmp(first, records, (size_t)size), "quip_trellis_expand", w->layer.m, w->layer.n, w->code);
        first = first ? first : records;
    }
    made.layer.codes = first, made.form = form;
    expect(quip_trellis_expand(&made, first, 0, 1) == -1, "refusal of records", w->layer.m, w->layer.n, form);
    return made;
}

static void call_trellis_linear(arena *a) {
    const int64_t n = TILE * some(a, 12), m = TILE * some(a, 8), count = one_in(a, 3) ? some(a, 18) : 1;
    const quip_trellis w = trellis_of(a, m, n);
    const int x_type = (int)below(a, 3), y_type = (int)below(a, 3);
    const int64_t stride = n + below(a, 3);
    const void *x = numbers(a, (count - 1) * stride + n, x_type, 0);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            void *y = exact(a, count * m * width(y_type));
            expect(!quip_trellis_linear(&w, x, y, count, stride, x_type, y_type, level, THREADS[t]), "refusal", m, n,
                   w.code);
            expect(!first || agree(first, y, count * m, y_type, tolerance_of(y_type)), "quip_trellis_linear", m, n,
                   100 * w.code + 10 * level + THREADS[t]);
            first = first ? first : y;
        }
    const quip_trellis records = records_of(a, &w, TRELLIS_RECORDS), bytes = records_of(a, &w, TRELLIS_BYTES);
    void *of_bytes = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            void *y = exact(a, count * m * width(y_type)), *z = exact(a, count * m * width(y_type));
            expect(!quip_trellis_linear(&records, x, y, count, stride, x_type, y_type, level, THREADS[t]), "refusal", m, n,
                   w.code);
            expect(agree(first, y, count * m, y_type, tolerance_of(y_type)), "codes of records", m, n,
                   100 * w.code + level);
            expect(!quip_trellis_linear(&bytes, x, z, count, stride, x_type, y_type, level, THREADS[t]), "refusal", m, n,
                   w.code);
            expect(!of_bytes || agree(of_bytes, z, count * m, y_type, SAME), "bytes", m, n, 100 * w.code + level);
            of_bytes = of_bytes ? of_bytes : z;
        }
}

static void call_trellis_decode(arena *a) {
    const int64_t n = TILE * some(a, 20), m = TILE * some(a, 8);
    const quip_trellis w = trellis_of(a, m, n);
    const int type = (int)below(a, 3);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            void *out = exact(a, m * n * width(type));
            expect(!quip_trellis_decode(&w, out, type, level, THREADS[t]), "refusal", m, n, w.code);
            expect(!first || agree(first, out, m * n, type, tolerance_of(type)), "quip_trellis_decode", m, n,
                   100 * w.code + 10 * level + THREADS[t]);
            first = first ? first : out;
        }
    quip_trellis bad = w;
    bad.pair_bits = one_in(a, 2) ? 2 * MOST_BITS + 2 : 9;
    expect(quip_trellis_decode(&bad, first, type, 0, 1) == -1, "refusal of these bits", m, n, bad.pair_bits);
}

static void call_transform_vectors(arena *a) {
    const int64_t n = some(a, 1500), count = below(a, 20), stride = n + below(a, 4);
    const int type = (int)below(a, 3), to = (int)below(a, 3);
    quip_transform_call call = {.q = transform_of(a, n), .count = count, .x_stride = stride, .x_type = type, .y_type = to};
    call.before_type = call.after_type = call.bias_type = (int)below(a, 3), call.transpose = (int)below(a, 2);
    call.x = numbers(a, count ? (count - 1) * stride + n : 0, type, 1);
    call.before = maybe_numbers(a, n, call.before_type), call.after = maybe_numbers(a, n, call.after_type);
    call.bias = maybe_numbers(a, n, call.bias_type);
    void *first = 0;
    for (int t = 0; t < 2; t++) {
        call.y = exact(a, count * n * width(to)), call.threads = THREADS[t];
        expect(!quip_transform_vectors(&call), "quip_transform_vectors", 0, n, -1);
        expect(!first || agree(first, call.y, count * n, to, SAME), "quip_transform_vectors", 0, n, count);
        first = first ? first : call.y;
    }
}

static int64_t code_bytes(int second) {
    return second == QUIP_E8P ? 4 : second == QUIP_E8 ? 4 : 2;
}

static void call_encode(arena *a) {
    const int second = (int)below(a, 3);
    const int64_t n = one_in(a, 8) ? 9000 + below(a, 100) : some(a, 300);
    const float *x = numbers(a, n * BLOCK, QUIP_FLOAT32, 1);
    void *first = 0;
    for (int t = 0; t < 2; t++) {
        void *codes = exact(a, n * code_bytes(second));
        quip_encode(x, n, second, 0.2f, codes, exact(a, n * BLOCK * 4), THREADS[t]);
        expect(!first || !memcmp(first, codes, (size_t)(n * code_bytes(second))), "quip_encode", 0, n, second);
        first = first ? first : codes;
    }
}

/* Feedback that does not grow without bound. */
static float *feedback_of(arena *a, int64_t columns) {
    float *result = numbers(a, columns * columns, QUIP_FLOAT32, 0);
    for (int64_t i = 0; i < columns * columns; i++) result[i] *= 0.01f;
    return result;
}

static void call_round_panel(arena *a) {
    const int second = (int)below(a, 3);
    const int64_t rows = some(a, 150), columns = BLOCK * some(a, one_in(a, 3) ? 32 : 6);
    const int64_t size = rows * columns / BLOCK * code_bytes(second);
    const float *target = numbers(a, rows * columns, QUIP_FLOAT32, 1), *base = numbers(a, rows * columns, QUIP_FLOAT32, 0);
    const float *feedback = feedback_of(a, columns);
    void *first = 0;
    for (int t = 0; t < 2; t++) {
        void *codes = exact(a, size);
        float *points = exact(a, rows * columns * 4), *delta = exact(a, rows * columns * 4);
        expect(!quip_round_panel(target, base, feedback, rows, columns, second, 0.2f, codes, points, delta, THREADS[t]),
               "quip_round_panel", rows, columns, -1);
        expect(!first || !memcmp(first, codes, (size_t)size), "quip_round_panel", rows, columns, second);
        first = first ? first : codes;
    }
    expect(quip_round_panel(target, base, feedback, rows, 264, second, 0.2f, first, 0, 0, 1) == -1, "refusal", rows, 264,
           0);
}

static void call_round_panel_scalar(arena *a) {
    const int64_t rows = some(a, 150), columns = some(a, 256), size = rows * columns;
    const int largest = 1 + (int)below(a, 255);
    const float *target = numbers(a, size, QUIP_FLOAT32, 1), *base = numbers(a, size, QUIP_FLOAT32, 0);
    const float *feedback = feedback_of(a, columns);
    void *first = 0;
    for (int t = 0; t < 2; t++) {
        uint8_t *codes = exact(a, size);
        float *points = exact(a, size * 4), *delta = exact(a, size * 4);
        expect(!quip_round_panel_scalar(target, base, feedback, rows, columns, largest, codes, points, delta, THREADS[t]),
               "quip_round_panel_scalar", rows, columns, -1);
        expect(!first || !memcmp(first, codes, (size_t)size), "quip_round_panel_scalar", rows, columns, largest);
        first = first ? first : codes;
    }
}

static void call_viterbi(arena *a) {
    const int weights = 1 + (int)below(a, 2), steps = 256 / weights, window = 2 + 2 * (int)below(a, steps / 2);
    const int even = 1 + (int)below(a, 16), odd = one_in(a, 2) ? even : 1 + (int)below(a, 16),
              passes = 1 + (int)below(a, 2);
    const int doublings = (int)below(a, 16);
    const int64_t count = below(a, 3), size = count * steps * 2;
    const int16_t *x = codes_of(a, count * 256 * 2), *levels = codes_of(a, (int64_t)weights * 65536 * 2);
    void *first = 0;
    for (int level = 0; level <= quip_cpu_level(); level++)
        for (int t = 0; t < 2; t++) {
            int16_t *states = exact(a, size);
            expect(
                !quip_viterbi(x, count, levels, weights, even, odd, doublings, window, passes, states, level, THREADS[t]),
                "quip_viterbi", even, odd, -1);
            expect(!first || !memcmp(first, states, (size_t)size), "quip_viterbi", even, odd, 10 * level + THREADS[t]);
            first = first ? first : states;
        }
    expect(quip_viterbi(x, count, levels, 3, even, odd, doublings, window, passes, first, 0, 1) == -1, "refusal", even, odd,
           3);
}

/* Needs a processor with AMX; elsewhere it does nothing, and the count of its calls says so. */
static void call_linear_many(arena *a) {
#if defined(QUIP_AMX)
    const int64_t n = 32 * some(a, 8), m = 32 * some(a, 5), count = some(a, 70), stride = n + below(a, 3), rows = 32;
    const int bytes = (int)below(a, 2), type = bytes && one_in(a, 2) ? QUIP_FLOAT16 : QUIP_BFLOAT16;
    const quip_layer l = layer_of(a, m, n, bytes ? QUIP_NO_STAGE : (int)below(a, 3), 1);
    const int64_t words = quip_bundle_words(n, bytes), bundles = (count + 2 * LANES - 1) / (2 * LANES) * 2, together = 32;
    const uint16_t *x = numbers(a, (count - 1) * stride + n, type, 1);
    void *first = 0;
    for (int t = 0; t < 2; t++)
        for (int rotated = 0; rotated < 1; rotated++) {
            const int64_t largest = m > n ? m : n, turned = (2 * THREADS[t] * LANES + 2) * largest * 4;
            const int64_t decoded = THREADS[t] * rows * (4 * words + BF16_MARGIN);
            uint16_t *y = exact(a, count * m * 2);
            uint32_t *between = exact(a, bundles * (words + bytes) * LANES * 4);
            float *z = exact(a, together * m * 4), *memory = quip_get_memory(turned > decoded ? turned : decoded);
            for (int again = 0; again < 2; again++)
                quip_linear_many(&l, x, y, type, count, stride, between, again, bytes, z, together, memory, rows,
                                 THREADS[t]);
            free(memory);
            expect(!first || agree(first, y, count * m, type, SAME), "quip_linear_many", m, n, count);
            first = first ? first : y;
        }
#else
    (void)a;
#endif
}

static const struct {
    const char *name;
    void (*call)(arena *);
} ENTRIES[] = {
    {"quip_linear", call_linear},
    {"quip_decode", call_decode},
    {"quip_trellis_linear", call_trellis_linear},
    {"quip_trellis_decode", call_trellis_decode},
    {"quip_transform_vectors", call_transform_vectors},
    {"quip_encode", call_encode},
    {"quip_round_panel", call_round_panel},
    {"quip_round_panel_scalar", call_round_panel_scalar},
    {"quip_viterbi", call_viterbi},
    {"quip_linear_many", call_linear_many},
};
enum { COUNT = sizeof ENTRIES / sizeof *ENTRIES };
static long made[COUNT], calls;

static void *run(void *seed) {
    arena a = {.state = 0x9e3779b97f4a7c15u * (uint64_t)(intptr_t)seed | 1};
    for (long i = 0; i < calls; i++) {
        const int which = (int)(i % COUNT);
        if (ENTRIES[which].call == call_linear_many && !quip_has_amx()) continue;
        if (ENTRIES[which].call == call_viterbi && i / COUNT % 8) continue; /* a long one */
        ENTRIES[which].call(&a);
        release(&a);
        __atomic_fetch_add(&made[which], 1, __ATOMIC_RELAXED);
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const long seed = atol(argv[1]), threads = atol(argv[3]);
    pthread_t others[64];
    calls = atol(argv[2]);
    quip_share_threads(0); /* threads of the library's own */
    quip_limit_threads(2 + (int)(seed % 7));
    for (long i = 1; i < threads; i++) pthread_create(&others[i], 0, run, (void *)(intptr_t)(1000 * seed + i));
    run((void *)(intptr_t)(1000 * seed));
    for (long i = 1; i < threads; i++) pthread_join(others[i], 0);
    if (argc > 4) {
        const pid_t child = fork();
        if (!child) {
            run((void *)(intptr_t)(1000 * seed + 77));
            _exit(differences);
        }
        int status;
        waitpid(child, &status, 0);
        expect(!status, "a child of fork", 0, 0, status);
    }
    printf("level %d, AMX %d:", quip_cpu_level(), quip_has_amx());
    for (int i = 0; i < COUNT; i++) printf(" %s %ld", ENTRIES[i].name, made[i]);
    printf("; %s\n", differences ? "DIFFERENCES" : "all agree");
    return differences;
}
