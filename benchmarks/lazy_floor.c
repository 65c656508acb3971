/*
 * The C floor of lazy memory within a process: one thread faults, another serves it.
 *
 * Knows: the shortest C that serves a fault of its own process.
 * Must not know: Python.
 *
 *   lazy_floor CPU PAGES      both threads on that CPU; prints JSON
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MARK 0x5a

static char content[PAGE];
static int uffd;

static void die(const char *what)
{
    fprintf(stderr, "lazy_floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000UL + (uint64_t)t.tv_nsec;
}

static void *serve(void *unused)
{
    (void)unused;
    for (;;) {
        struct pollfd ready = {uffd, POLLIN, 0};
        struct uffd_msg message;
        if (poll(&ready, 1, -1) < 0)
            die("poll");
        while (read(uffd, &message, sizeof message) == sizeof message) {
            struct uffdio_copy copy = {
                .dst = message.arg.pagefault.address & ~(PAGE - 1),
                .src = (uintptr_t)content,
                .len = PAGE,
            };
            if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
                die("UFFDIO_COPY");
        }
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(atoi(argv[1]), &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
    size_t pages = strtoull(argv[2], NULL, 10);
    memset(content, MARK, PAGE);
    /* UFFD_USER_MODE_ONLY is 1: without privilege, as LazyMemory */
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = {.api = UFFD_API};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        die("userfaultfd");
    volatile char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct uffdio_register range = {
        .range = {(uintptr_t)memory, pages * PAGE},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (memory == MAP_FAILED || ioctl(uffd, UFFDIO_REGISTER, &range))
        die("UFFDIO_REGISTER");
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, NULL))
        die("pthread_create");
    uint64_t *took = malloc(pages * sizeof *took);
    for (size_t i = 0; i < pages; i++) {
        uint64_t before = now();
        if (memory[i * PAGE] != MARK)
            die("wrong byte");
        took[i] = now() - before;
    }
    qsort(took, pages, sizeof *took, by_size);
    printf("{\"p50_ns\": %llu, \"p99_ns\": %llu}\n", (unsigned long long)took[pages / 2],
           (unsigned long long)took[pages * 99 / 100]);
    return 0;
}
