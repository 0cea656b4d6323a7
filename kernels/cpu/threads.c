/* Share work among threads.
 *
 * PyTorch keeps its own worker threads, which spin for a while after each operation. A second pool would compete with
 * them for the processors. So PyTorch's threads are used if Python has passed the entry point of their OpenMP runtime;
 * otherwise threads are created for each call with enough work. Each thread first works through its own share from the
 * beginning, so that it reads adjacent memory. Then it helps the others with the rest of their shares, so that a delayed
 * thread does not delay the work.
 *
 * But the runtime waits for all of its threads at the end of a call, also for one that finds no work left because another
 * program had its processor. So the time that threads win is counted against the time that is spent waiting for them. When
 * more is lost than won, calls stay on their own thread for PAUSE times as long as what was lost, and then try again. */
#include <pthread.h>
#include <time.h>

#include "common.h"

#define MOST_THREADS 64
#define LEAST_PIECES 16 /* per thread, for which creating threads is worth it */

typedef void (*fork_join)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static fork_join shared_threads;
static int most_threads = MOST_THREADS;

#define PAUSE 10              /* so that waiting costs a tenth of the time at most */
#define MOST_WON 1000000      /* nanoseconds that count at most, so that an old win does not hide a loss of now */
#define LEAST_LOST 100000     /* for which a pause is worth it */
#define SLOW 500000           /* nanoseconds of a call in which threads may have lost their processor */
#define SUSPICIOUS 64         /* calls after such a one, for which the threads' own time is measured: that takes longer */
static int64_t lost, paused_until; /* nanoseconds; lost: negative if more was won */
static int suspicious;

typedef struct {
    quip_body body;
    void *context;
    int64_t count, grain, size; /* size: of a share, in whole pieces */
    int shares, started;
    clockid_t clock;
    int64_t spent; /* by all threads together, by this clock */
    struct {
        int64_t next;
        char apart[56]; /* puts the counter of each thread into its own cache line */
    } taken[MOST_THREADS];
} job;

static int64_t now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

static void work(void *argument) {
    job *j = argument;
    const int own = __atomic_fetch_add(&j->started, 1, __ATOMIC_RELAXED);
    const int64_t begun = j->shares > 1 ? now(j->clock) : 0;
    for (int i = 0; i < j->shares; i++) {
        const int share = (own + i) % j->shares;
        const int64_t begin = share * j->size, end = begin + j->size < j->count ? begin + j->size : j->count;
        for (;;) {
            const int64_t first = begin + __atomic_fetch_add(&j->taken[share].next, j->grain, __ATOMIC_RELAXED);
            if (first >= end) break;
            j->body(j->context, first, first + j->grain < end ? first + j->grain : end);
        }
    }
    if (j->shares > 1) __atomic_fetch_add(&j->spent, now(j->clock) - begun, __ATOMIC_RELAXED);
}

/* Count what a call with threads has won or lost, and decide on a pause. One thread would have needed the time of all. */
static void judge(const job *j, int64_t begin) {
    const int64_t end = now(CLOCK_MONOTONIC), passed = end - begin;
    int64_t sum = __atomic_load_n(&lost, __ATOMIC_RELAXED) + passed - j->spent;
    if (passed > SLOW)
        __atomic_store_n(&suspicious, SUSPICIOUS, __ATOMIC_RELAXED);
    else if (j->clock != CLOCK_MONOTONIC)
        __atomic_fetch_sub(&suspicious, 1, __ATOMIC_RELAXED);
    if (sum > LEAST_LOST) {
        __atomic_store_n(&paused_until, end + PAUSE * sum, __ATOMIC_RELAXED);
        sum = 0;
    }
    __atomic_store_n(&lost, sum < -MOST_WON ? -MOST_WON : sum, __ATOMIC_RELAXED);
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
    if (threads > most_threads) threads = most_threads;
    if (threads < 1) threads = 1;
    const int64_t begin = threads > 1 && shared_threads ? now(CLOCK_MONOTONIC) : 0;
    if (begin && begin < __atomic_load_n(&paused_until, __ATOMIC_RELAXED)) threads = 1;
    j.body = body;
    j.context = context;
    j.count = count;
    j.shares = threads;
    const int64_t each = (pieces + threads - 1) / threads; /* all of about one size */
    j.grain = each ? (count + threads * each - 1) / (threads * each) : 1;
    j.size = each * j.grain;
    j.started = 0;
    j.spent = 0;
    j.clock = __atomic_load_n(&suspicious, __ATOMIC_RELAXED) > 0 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    for (int i = 0; i < threads; i++) j.taken[i].next = 0;
    if (threads == 1) {
        work(&j);
    } else if (shared_threads) {
        shared_threads(work, &j, (unsigned)threads, 0);
        judge(&j, begin);
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
    lost = paused_until = 0;
    suspicious = 0;
}

/* No call uses more threads than that, whatever it asks for: 1 or more. */
EXPORT void quip_limit_threads(int count) {
    most_threads = count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count;
}
