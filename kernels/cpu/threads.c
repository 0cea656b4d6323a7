/* Sharing work among threads.
 *
 * PyTorch keeps its own worker threads, which go on spinning for a while after each operation. A second pool would
 * fight with them for the processors between any two operations, so theirs are used where Python has handed over the
 * entry point of their OpenMP runtime; otherwise threads are made for each call that is worth it. Each thread goes through
 * a share of its own from the beginning, so that what it reads lies side by side, and then helps the others with what is
 * left of theirs, so that a thread which is held up does not hold them up. */
#include <pthread.h>

#include "common.h"

#define MOST_THREADS 64
#define LEAST_PIECES 16 /* per thread, before new threads are worth making */

typedef void (*fork_join)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static fork_join shared_threads;

typedef struct {
    quip_body body;
    void *context;
    int64_t count, grain, size; /* of a share, in whole pieces */
    int shares, started;
    struct {
        int64_t next;
        char apart[56]; /* counters of threads in cache lines of their own */
    } taken[MOST_THREADS];
} job;

static void work(void *argument) {
    job *j = argument;
    const int own = __atomic_fetch_add(&j->started, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < j->shares; i++) {
        const int share = (own + i) % j->shares;
        const int64_t begin = share * j->size, end = begin + j->size < j->count ? begin + j->size : j->count;
        for (;;) {
            const int64_t first = begin + __atomic_fetch_add(&j->taken[share].next, j->grain, __ATOMIC_RELAXED);
            if (first >= end) break;
            j->body(j->context, first, first + j->grain < end ? first + j->grain : end);
        }
    }
}

static void *work_in_thread(void *argument) {
    work(argument);
    return 0;
}

HIDDEN void quip_parallel(quip_body body, void *context, int64_t count, int64_t grain, int threads) {
    const int64_t pieces = (count + grain - 1) / grain; /* no larger than that */
    const int64_t most = shared_threads ? pieces : pieces / LEAST_PIECES;
    job j;
    if (threads > most) threads = (int)most;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 1) threads = 1;
    j.body = body;
    j.context = context;
    j.count = count;
    j.shares = threads;
    const int64_t each = (pieces + threads - 1) / threads; /* of which all have about one size */
    j.grain = each ? (count + threads * each - 1) / (threads * each) : 1;
    j.size = each * j.grain;
    j.started = 0;
    for (int i = 0; i < threads; i++) j.taken[i].next = 0;
    if (threads == 1) {
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
EXPORT void quip_share_threads(void *entry) {
    shared_threads = (fork_join)entry;
}
