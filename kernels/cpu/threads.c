/* Sharing work among threads.
 *
 * PyTorch keeps its own worker threads, which go on spinning for a while after each operation. A second pool would
 * fight with them for the processors between any two operations, so theirs are used where Python has handed over the
 * entry point of their OpenMP runtime; otherwise threads are made for each call that is worth it. Pieces are taken
 * from a counter, so that a thread which is held up does not hold up the others. */
#include <pthread.h>

#include "common.h"

#define MOST_THREADS 64
#define LEAST_PIECES 16 /* per thread, before new threads are worth making */

typedef void (*fork_join)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static fork_join shared_threads;

typedef struct {
    quip_body body;
    void *context;
    int64_t count, grain, next;
} job;

static void work(void *argument) {
    job *j = argument;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&j->next, j->grain, __ATOMIC_RELAXED);
        if (first >= j->count) return;
        j->body(j->context, first, first + j->grain < j->count ? first + j->grain : j->count);
    }
}

static void *work_in_thread(void *argument) {
    work(argument);
    return 0;
}

HIDDEN void quip_parallel(quip_body body, void *context, int64_t count, int64_t grain, int threads) {
    const int64_t pieces = (count + grain - 1) / grain;
    const int64_t most = shared_threads ? pieces : pieces / LEAST_PIECES;
    job j = {body, context, count, grain, 0};
    if (threads > most) threads = (int)most;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1) {
        work(&j);
    } else if (shared_threads) {
        shared_threads(work, &j, (unsigned)threads, 0);
    } else {
        pthread_t made[MOST_THREADS];
        int count_made = 0;
        for (int i = 1; i < threads; i++) count_made += pthread_create(&made[count_made], 0, work_in_thread, &j) == 0;
        work(&j);
        while (count_made) pthread_join(made[--count_made], 0);
    }
}

/* Use another runtime's threads: `entry` is its GOMP_parallel, or null for threads of our own. */
EXPORT void quip_share_threads(void *entry) { shared_threads = (fork_join)entry; }
