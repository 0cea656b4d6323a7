"""Damaged and hostile checkpoints, killed writers, and the C library under sanitizers.

    make fuzz COUNT=1000 SEED=1        mutated checkpoints; each is read in a process with limits on time and memory
    make fuzz-kill COUNT=100 SEED=1    writers that are killed at random moments
    make sanitize                      the C library under AddressSanitizer, UBSan and ThreadSanitizer

`specimens` makes the checkpoints, the files `mutate_*` change them, `worker` reads one, `explain` decides whether a change
may have an effect at all, and `verdict` says what became of it. A mutation depends on "SEED/NUMBER" and on the list of
specimens alone, so `python -m tests.fuzz --seed S --replay N` repeats one and prints all of it.
"""
