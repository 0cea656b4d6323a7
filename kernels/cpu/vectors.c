/* Incoherence transforms of many vectors, without a weight between them. */
#include <stdlib.h>

#include "common.h"

HIDDEN void *quip_get_memory(int64_t bytes) {
    return aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
}

FOR_EACH_CPU HIDDEN void quip_scale_vector(float *restrict x, const float *restrict by, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= by[i];
}

FOR_EACH_CPU HIDDEN void quip_add_vector(float *restrict x, const float *restrict other, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += other[i];
}

#define TOGETHER (1 << 14) /* numbers transformed at once: they and their copy stay in a cache */

static void transform_vectors(void *context, int64_t first, int64_t last) {
    quip_transform_call *call = context;
    const int64_t n = call->q->size, most = TOGETHER / n < 1 ? 1 : TOGETHER / n;
    const int64_t room = (last - first < most ? last - first : most) * n;
    float *memory = quip_get_memory(2 * room * (int64_t)sizeof *memory);
    if (!memory) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t begin = first; begin < last; begin += most) {
        const int64_t count = last - begin < most ? last - begin : most;
        for (int64_t v = 0; v < count; v++) {
            quip_load(call->x, call->x_type, (begin + v) * call->x_stride, memory + v * n, n);
            if (call->vectors[0]) quip_scale_vector(memory + v * n, call->vectors[0], n);
        }
        float *t = quip_apply_many(call->q, call->transpose, memory, memory + room, count);
        for (int64_t v = 0; v < count; v++, t += n) {
            if (call->vectors[1]) quip_scale_vector(t, call->vectors[1], n);
            if (call->vectors[2]) quip_add_vector(t, call->vectors[2], n);
            quip_store(t, call->y, call->y_type, (begin + v) * n, n);
        }
    }
    free(memory);
}

EXPORT int quip_transform_vectors(quip_transform_call *call) {
    const int64_t n = call->q->size;
    const void *given[3] = {call->before, call->after, call->bias};
    const int types[3] = {call->before_type, call->after_type, call->bias_type};
    float *memory = quip_get_memory(3 * n * (int64_t)sizeof *memory);
    if (!memory) return -2;
    for (int i = 0; i < 3; i++) {
        call->vectors[i] = given[i] ? memory + i * n : 0;
        if (given[i]) quip_load(given[i], types[i], 0, call->vectors[i], n);
    }
    call->failed = 0;
    quip_parallel(transform_vectors, call, call->count, TOGETHER / n + 1, call->threads);
    free(memory);
    return call->failed ? -2 : 0;
}
