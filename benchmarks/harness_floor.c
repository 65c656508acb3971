/*
 * Who touches memory in the benchmarks of the test harness, and the C floor of the harness.
 *
 * Knows: how to take the time of a touch, and the shortest C that stops one and lets it go.
 * Must not know: Python; who touches cannot tell the C floor from the harness.
 *
 * As a library (ctypes): touch_each, touch_when_told, increment.  As a program, all on one CPU:
 *
 *   harness_floor plain  CPU PAGES    first touches of a plain memfd
 *   harness_floor walk   CPU PAGES    ... that another process serves: poll, read, UFFDIO_COPY
 *   harness_floor step   CPU PAGES    ... which steps over the touch, and takes the page away
 *   harness_floor freeze CPU PAGES    ... that stands there until we have said that it may go on
 *
 * It prints JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L

static void die(const char *what)
{
    fprintf(stderr, "harness_floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000UL + (uint64_t)t.tv_nsec;
}

/* --- who touches --- */

/* Read a byte of each page, first to last; the nanoseconds of each. */
void touch_each(const volatile unsigned char *at, long pages, uint64_t *took)
{
    for (long i = 0; i < pages; i++) {
        uint64_t before = now();
        (void)at[i * PAGE];
        took[i] = now() - before;
    }
}

/* The same, but each when a byte comes from `go`; what time it was before and after. */
void touch_when_told(int go, int done, const volatile unsigned char *at, long pages,
                     uint64_t *before, uint64_t *after)
{
    char byte;
    for (long i = 0; i < pages; i++) {
        if (read(go, &byte, 1) != 1)
            return;
        before[i] = now();
        (void)at[i * PAGE];
        after[i] = now();
        if (write(done, &byte, 1) != 1)
            return;
    }
}

/* A counter that is not atomic: load, then store. */
void increment(volatile unsigned char *at, long times)
{
    for (long i = 0; i < times; i++)
        *at = *at + 1;
}

/* --- the floor --- */

static int memfd;

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static uint64_t at_percent(uint64_t *values, long count, long percent)
{
    qsort(values, (size_t)count, sizeof *values, by_size);
    return values[count * percent / 100];
}

static void show(uint64_t *took, long pages)
{
    printf("{\"p50_ns\": %lu, ", at_percent(took, pages, 50));
    printf("\"p99_ns\": %lu}\n", at_percent(took, pages, 99));
}

static unsigned char *map(long pages)
{
    memfd = (int)syscall(SYS_memfd_create, "floor", MFD_CLOEXEC);
    if (memfd < 0 || ftruncate(memfd, pages * PAGE))
        die("memfd_create");
    void *memory = mmap(NULL, (size_t)(pages * PAGE), PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static int watch(unsigned char *memory, long pages)
{
    /* UFFD_USER_MODE_ONLY is 1: without privilege */
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID};
    struct uffdio_register range = {
        .range = {(uintptr_t)memory, (uint64_t)(pages * PAGE)},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
        die("userfaultfd");
    return uffd;
}

static void copy(int uffd, uint64_t page, uint64_t mode)
{
    static char content[PAGE];
    struct uffdio_copy copy = {page, (uintptr_t)content, PAGE, mode, 0};
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
        die("UFFDIO_COPY");
}

/* Let one thread make one access, and take the page away again before it makes the next. */
static void step(int uffd, pid_t thread, uint64_t page, uint64_t start)
{
    int status;
    if (ptrace(PTRACE_SEIZE, thread, NULL, NULL) || ptrace(PTRACE_INTERRUPT, thread, NULL, NULL) ||
        waitpid(thread, &status, __WALL) != thread)
        die("PTRACE_SEIZE");
    copy(uffd, page, UFFDIO_COPY_MODE_DONTWAKE);
    if (ptrace(PTRACE_SINGLESTEP, thread, NULL, NULL) || waitpid(thread, &status, __WALL) != thread)
        die("PTRACE_SINGLESTEP");
    if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page - start), PAGE))
        die("fallocate");
    if (ptrace(PTRACE_DETACH, thread, NULL, NULL))
        die("PTRACE_DETACH");
}

/*
 * Serve for ever; `door` (if any) hears of each touch and says when it may be made.  With
 * `start`, where the memory begins, touches are stepped over.
 */
static void serve(int uffd, int door, uint64_t start)
{
    for (;;) {
        struct pollfd ready = {uffd, POLLIN, 0};
        struct uffd_msg message;
        if (poll(&ready, 1, -1) < 0)
            die("poll");
        while (read(uffd, &message, sizeof message) == sizeof message) {
            char released;
            if (door >= 0 && (send(door, &message, sizeof message, 0) < 0 ||
                              recv(door, &released, 1, 0) != 1))
                exit(0);
            uint64_t page = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
            if (start)
                step(uffd, (pid_t)message.arg.pagefault.feat.ptid, page, start);
            else
                copy(uffd, page, 0);
        }
    }
}

static void start_handler(int uffd, int door, int other_end, uint64_t start)
{
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(other_end);
        serve(uffd, door, start);
    }
    prctl(PR_SET_PTRACER, child, 0, 0, 0);
    close(uffd); /* if the handler dies, no thread waits for ever */
}

struct told {
    int go, done;
    unsigned char *memory;
    long pages;
    uint64_t *before, *after;
};

static void *run_told(void *argument)
{
    struct told *t = argument;
    touch_when_told(t->go, t->done, t->memory, t->pages, t->before, t->after);
    return NULL;
}

static void freeze(unsigned char *memory, long pages, uint64_t *took)
{
    int door[2], go[2], done[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, door) || pipe(go) || pipe(done))
        die("socketpair");
    start_handler(watch(memory, pages), door[1], door[0], 0);
    close(door[1]);
    size_t size = (size_t)pages * sizeof *took;
    uint64_t *before = malloc(size), *after = malloc(size);
    uint64_t *standing = malloc(size), *going = malloc(size);
    memset(before, 1, size), memset(after, 1, size);
    struct told told = {go[0], done[1], memory, pages, before, after};
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_told, &told))
        die("pthread_create");
    for (long i = 0; i < pages; i++) {
        struct uffd_msg message;
        char byte = 0;
        if (write(go[1], &byte, 1) != 1 || recv(door[0], &message, sizeof message, 0) <= 0)
            die("the handler");
        standing[i] = now();
        going[i] = now();
        if (send(door[0], &byte, 1, 0) != 1 || read(done[0], &byte, 1) != 1)
            die("the handler");
    }
    pthread_join(thread, NULL);
    for (long i = 0; i < pages; i++) {
        took[i] = after[i] - before[i];
        standing[i] -= before[i];
        going[i] = after[i] - going[i];
    }
    printf("{\"stop_ns\": %lu, ", at_percent(standing, pages, 50));
    printf("\"go_ns\": %lu, ", at_percent(going, pages, 50));
    printf("\"p50_ns\": %lu, ", at_percent(took, pages, 50));
    printf("\"p99_ns\": %lu}\n", at_percent(took, pages, 99));
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(atoi(argv[2]), &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
    long pages = atol(argv[3]);
    uint64_t *took = malloc((size_t)pages * sizeof *took);
    memset(took, 1, (size_t)pages * sizeof *took); /* our own faults come before the clock */
    unsigned char *memory = map(pages);
    if (!strcmp(argv[1], "freeze")) {
        freeze(memory, pages, took);
        return 0;
    }
    if (strcmp(argv[1], "plain"))
        start_handler(watch(memory, pages), -1, -1, strcmp(argv[1], "step") ? 0 : (uintptr_t)memory);
    touch_each(memory, pages, took);
    show(took, pages);
    return 0;
}
