/* Calls functions of the library for a program on another processor (arm_library.py), which sends their arguments.
 *
 * Standard input has calls, one after the other, in numbers of 64 bits: a `header`; the arguments; the sizes of the pieces
 * of memory, negative for those that are only read; links, which are the places of pointers; then the bytes of all pieces.
 * Standard output gets the result and the bytes of those pieces that may be written. A float32 is the low half of its
 * argument. Each piece ends where memory that cannot be read begins, so that a read or a write beyond it ends the program. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "trellis.h"

EXPORT void quip_encode(const float *, int64_t, int, float, void *, float *, int);
EXPORT int quip_round_panel(const float *, const float *, const float *, int64_t, int64_t, int, float, void *, float *,
                            float *, int);
EXPORT int quip_round_panel_scalar(const float *, const float *, const float *, int64_t, int64_t, int, uint8_t *, float *,
                                   float *, int);
EXPORT int quip_linear(const quip_layer *, const void *, void *, int64_t, int64_t, int, int, int, int, int);
EXPORT void quip_decode(const void *, const void *, int, float, int64_t, int64_t, void *, int, int, int, int);
EXPORT int quip_trellis_linear(const quip_trellis *, const void *, void *, int64_t, int64_t, int, int, int, int);
EXPORT int quip_trellis_decode(const quip_trellis *, void *, int, int, int);
EXPORT int quip_trellis_expand(const quip_trellis *, void *, int, int);
EXPORT void quip_to_nibbles(int, const void *, int64_t, int64_t, uint8_t *, int);
EXPORT int quip_from_nibbles(int, const uint8_t *, int64_t, int64_t, void *, int);
EXPORT int quip_viterbi(const int16_t *, int64_t, const int16_t *, int, int, int, int, int, int, int16_t *, int, int);
EXPORT int quip_has_amx(void);

#define PAGE 4096
#define MOST_ARGUMENTS 16
#define MOST_PIECES 64

/* In the order of `NAMES` in arm_library.py. */
enum {
    ENCODE,
    ROUND_PANEL,
    ROUND_PANEL_SCALAR,
    LINEAR,
    DECODE,
    TRANSFORM,
    TRELLIS_LINEAR,
    TRELLIS_DECODE,
    VITERBI,
    AMX,
    LEVEL,
    TO_NIBBLES,
    FROM_NIBBLES,
    TRELLIS_EXPAND
};

typedef struct {
    int64_t function, repeats, arguments, pieces, links;
} header;

/* A pointer: its place, in a piece or, with -1, in the arguments; and where it points to. */
typedef struct {
    int64_t piece, offset, target, target_offset;
} link;

static void must(int succeeded, const char *what) {
    if (succeeded) return;
    fprintf(stderr, "driver: %s\n", what);
    exit(2);
}

static void get(void *to, int64_t bytes) {
    must(fread(to, 1, (size_t)bytes, stdin) == (size_t)bytes, "a call is incomplete");
}

static void put(const void *from, int64_t bytes) {
    must(fwrite(from, 1, (size_t)bytes, stdout) == (size_t)bytes, "the result cannot be written");
}

static float real(int64_t argument) {
    float value;
    memcpy(&value, &argument, sizeof value);
    return value;
}

/* For the count of instructions in kernels/benchmarks/arm.py, which looks for the addresses of these two. */
__attribute__((noinline)) static void called(void) {
    __asm__ volatile("");
}

__attribute__((noinline)) static int64_t call(int64_t function, const int64_t *a) {
    void *p[MOST_ARGUMENTS];
    int i[MOST_ARGUMENTS];
    for (int k = 0; k < MOST_ARGUMENTS; k++) p[k] = (void *)a[k], i[k] = (int)a[k];
    switch (function) {
        case ENCODE: quip_encode(p[0], a[1], i[2], real(a[3]), p[4], p[5], i[6]); return 0;
        case ROUND_PANEL: return quip_round_panel(p[0], p[1], p[2], a[3], a[4], i[5], real(a[6]), p[7], p[8], p[9], i[10]);
        case ROUND_PANEL_SCALAR: return quip_round_panel_scalar(p[0], p[1], p[2], a[3], a[4], i[5], p[6], p[7], p[8], i[9]);
        case LINEAR: return quip_linear(p[0], p[1], p[2], a[3], a[4], i[5], i[6], i[7], i[8], i[9]);
        case DECODE: quip_decode(p[0], p[1], i[2], real(a[3]), a[4], a[5], p[6], i[7], i[8], i[9], i[10]); return 0;
        case TRANSFORM: return quip_transform_vectors(p[0]);
        case TRELLIS_LINEAR: return quip_trellis_linear(p[0], p[1], p[2], a[3], a[4], i[5], i[6], i[7], i[8]);
        case TRELLIS_DECODE: return quip_trellis_decode(p[0], p[1], i[2], i[3], i[4]);
        case TRELLIS_EXPAND: return quip_trellis_expand(p[0], p[1], i[2], i[3]);
        case VITERBI: return quip_viterbi(p[0], a[1], p[2], i[3], i[4], i[5], i[6], i[7], i[8], p[9], i[10], i[11]);
        case AMX: return quip_has_amx();
        case LEVEL: return quip_cpu_level();
        case TO_NIBBLES: quip_to_nibbles(i[0], p[1], a[2], a[3], p[4], i[5]); return 0;
        case FROM_NIBBLES: return quip_from_nibbles(i[0], p[1], a[2], a[3], p[4], i[5]);
        default: must(0, "there is no such function"); return 0;
    }
}

int main(void) {
    header h;
    while (fread(&h, sizeof h, 1, stdin) == 1) {
        int64_t arguments[MOST_ARGUMENTS] = {0}, sizes[MOST_PIECES], whole[MOST_PIECES];
        char *begins[MOST_PIECES], *pieces[MOST_PIECES];
        must(h.arguments <= MOST_ARGUMENTS && h.pieces <= MOST_PIECES, "a call is too large");
        get(arguments, h.arguments * 8);
        get(sizes, h.pieces * 8);
        link *links = malloc((size_t)h.links * sizeof *links + 1);
        must(links != 0, "no memory");
        get(links, h.links * (int64_t)sizeof *links);
        for (int64_t i = 0; i < h.pieces; i++) {
            const int64_t bytes = llabs(sizes[i]);
            whole[i] = (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
            begins[i] = mmap(0, (size_t)whole[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            must(begins[i] != MAP_FAILED, "no memory");
            must(!mprotect(begins[i] + whole[i] - PAGE, PAGE, PROT_NONE), "no memory");
            pieces[i] = begins[i] + whole[i] - PAGE - bytes;
            get(pieces[i], bytes);
        }
        for (int64_t i = 0; i < h.links; i++) {
            char *place = links[i].piece < 0 ? (char *)arguments : pieces[links[i].piece];
            const char *target = pieces[links[i].target] + links[i].target_offset;
            memcpy(place + links[i].offset, &target, sizeof target);
        }
        free(links);
        int64_t result = 0;
        for (int64_t i = 0; i < h.repeats; i++) {
            result = call(h.function, arguments);
            called();
        }
        put(&result, sizeof result);
        for (int64_t i = 0; i < h.pieces; i++) {
            if (sizes[i] > 0) put(pieces[i], sizes[i]);
            munmap(begins[i], (size_t)whole[i]);
        }
        must(!fflush(stdout), "the result cannot be written");
    }
    return 0;
}
