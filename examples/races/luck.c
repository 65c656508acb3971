/* What is seen of the race in parser.c without a harness: two threads and luck.

   In each run the parser parses once, and the sender writes another length once.  Both start
   together, and each waits a random time of up to twenty microseconds first. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { PAYLOAD = 64, LONGEST = 255, MOST_NS = 20000 };

typedef int parser(const volatile void *packet, void *message);

struct race {
    _Alignas(64) volatile uint8_t packet[2 + LONGEST];
    _Alignas(64) uint8_t message[2 + LONGEST];
    _Alignas(64) atomic_int started; /* the run that the parser is in */
    atomic_int sent;                 /* the run in which the sender has written */
    int runs;
    uint32_t random;
};

static uint32_t next(uint32_t *state) /* G. Marsaglia's xorshift */
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void wait_ns(uint32_t ns)
{
    struct timespec start, now;

    clock_gettime(CLOCK_MONOTONIC, &start);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < (long)ns);
}

static void *send(void *argument)
{
    struct race *race = argument;
    uint32_t random = race->random * 2654435761u | 1;

    for (int run = 1; run <= race->runs; run++) {
        while (atomic_load(&race->started) < run)
            sched_yield();
        wait_ns(next(&random) % MOST_NS);
        race->packet[1] = LONGEST;
        atomic_store(&race->sent, run);
    }
    return 0;
}

/* Give in how many of the runs the parser wrote past the payload; -1: no second thread. */
int luck(parser *parse, int runs, uint32_t seed)
{
    struct race race = {.runs = runs, .random = seed | 1};
    uint32_t random = race.random;
    int seen = 0;
    pthread_t sender;

    if (pthread_create(&sender, 0, send, &race))
        return -1;
    for (int run = 1; run <= runs; run++) {
        memset(race.message, 0xA5, sizeof race.message);
        race.packet[1] = 16;
        atomic_store(&race.started, run);
        wait_ns(next(&random) % MOST_NS);
        parse(race.packet, race.message);
        seen += race.message[2 + PAYLOAD] != 0xA5;
        while (atomic_load(&race.sent) < run)
            sched_yield();
    }
    pthread_join(sender, 0);
    return seen;
}
