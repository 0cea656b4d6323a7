/* Share work among threads.
 *
 * PyTorch keeps its own worker threads, which spin for a while after each operation. A second pool would compete with
 * them for the processors. So PyTorch's threads are used if Python has passed the entry point of their OpenMP runtime;
 * otherwise threads are created for each call with enough work. Each thread first works through its own share from the
 * beginning, so that it reads adjacent memory. Then it helps the others with the rest of their shares, so that a delayed
 * thread does not delay the call. */
#include <pthread.h>

#include "common.h"

#define MOST_THREADS 64
#define LEAST_PIECES 16 /* per thread, for which creating threads is worth it */

typedef void (*fork_join)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static fork_join shared_threads;

typedef struct {
    quip_body body;
    void *context;
    int64_t count, grain, size; /* size: of a share, in whole pieces */
    int shares, started;
    struct {
        int64_t next;
        char apart[56]; /* puts the counter of each thread into its own cache line */
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
    const int64_t each = (pieces + threads - 1) / threads; /* all of about one size */
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

/* Use another runtime's threads: `entry` is its GOMP_parallel, or null to create threads. */
EXPORT void quip_share_threads(void *entry) {
    shared_threads = (fork_join)entry;
}
