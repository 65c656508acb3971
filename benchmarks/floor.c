/*
 * The C floor and the measuring target of every benchmark of faults.
 *
 * Knows: how to fault, how to take the time of a fault, and the shortest C that serves one.
 * Must not know: who serves; a target cannot tell the C floor from Python.
 *
 *   floor target  SOCKET CPU PAGES RANGES UFFDS THREADS BLOCKS   fault; prints JSON
 *   floor handler SOCKET CPU WHOLE                        poll, read, UFFDIO_COPY
 *   floor idle    SOCKET BYTES                            map, hand over, wait for the end
 *   floor bulk    SOCKET CPU PIECE                        UFFDIO_COPY in pieces; prints JSON
 *
 * The hand-over, over a connected Unix stream socket: struct layout, then one byte for every
 * userfaultfd, the descriptors beside the bytes.  The handler registers the ranges (range i
 * belongs to descriptor i % uffds) and answers with one byte; then the target starts.
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
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define BATCH 64    /* messages per read, as many as the pager reads */
#define FDS 200     /* descriptors per message; the kernel allows 253 */
#define MARK 0x5a   /* every byte that a handler fills in */
#define BULK_SOURCE (256UL << 20) /* bytes that a bulk fill copies from, again and again */

struct layout {
    uint64_t start, length;        /* the whole mapping */
    uint64_t ranges, range_length; /* range i: start + i * stride, range_length bytes */
    uint64_t stride, uffds;
};

static void die(const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000UL + (uint64_t)t.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
}

static void read_all(int fd, void *buffer, size_t length)
{
    for (char *p = buffer; length;) {
        ssize_t n = read(fd, p, length);
        if (n <= 0)
            die("the other side of the socket");
        p += n;
        length -= (size_t)n;
    }
}

/* --- hand-over --- */

static int open_uffd(void)
{
    int fd = -1, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        die("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID};
    if (ioctl(fd, UFFDIO_API, &api))
        die("UFFDIO_API");
    return fd;
}

static void send_fds(int socket, const int *fds, size_t count)
{
    char bytes[FDS] = {0};
    while (count) {
        size_t n = count < FDS ? count : FDS;
        union {
            char space[CMSG_SPACE(FDS * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec io = {bytes, n};
        struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                                 .msg_controllen = CMSG_SPACE(n * sizeof(int))};
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(header), fds, n * sizeof(int));
        if (sendmsg(socket, &message, 0) != (ssize_t)n)
            die("sendmsg");
        fds += n;
        count -= n;
    }
}

static void receive_fds(int socket, int *fds, size_t count)
{
    while (count) {
        char bytes[FDS];
        union {
            char space[CMSG_SPACE(FDS * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec io = {bytes, count < FDS ? count : FDS};
        struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                                 .msg_controllen = sizeof control.space};
        if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) <= 0)
            die("recvmsg");
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (!header || header->cmsg_type != SCM_RIGHTS)
            die("no descriptors in the message");
        size_t n = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(header), n * sizeof(int));
        fds += n;
        count -= n;
    }
}

static void *map(size_t length)
{
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        die("mmap");
    madvise(p, length, MADV_NOHUGEPAGE);
    return p;
}

static struct layout hand_over(int socket, struct layout layout)
{
    layout.start = (uint64_t)(uintptr_t)map(layout.length);
    int *fds = calloc(layout.uffds, sizeof *fds);
    for (uint64_t i = 0; i < layout.uffds; i++)
        fds[i] = open_uffd();
    if (write(socket, &layout, sizeof layout) != sizeof layout)
        die("write");
    send_fds(socket, fds, layout.uffds);
    for (uint64_t i = 0; i < layout.uffds; i++)
        close(fds[i]); /* the handler alone holds it: if it dies, no thread waits for ever */
    free(fds);
    char go;
    read_all(socket, &go, 1);
    return layout;
}

/* --- the target --- */

struct touching {
    struct layout layout;
    uint64_t pages, thread, threads, blocks, wrong;
    uint32_t *took_ns;
    pthread_t id;
};

static pthread_barrier_t barrier;

/*
 * Thread t touches every threads-th page: going round the ranges, so that each fault is in
 * another one, or (blocks) a range to its end before the next.
 */
static void *touch(void *argument)
{
    struct touching *t = argument;
    const struct layout *l = &t->layout;
    uint64_t count = t->pages / t->threads, per_range = l->range_length / PAGE;
    pthread_barrier_wait(&barrier);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t n = i * t->threads + t->thread;
        volatile unsigned char *p = (volatile unsigned char *)(uintptr_t)(
            t->blocks ? l->start + n / per_range * l->stride + n % per_range * PAGE
                      : l->start + n % l->ranges * l->stride + n / l->ranges * PAGE);
        uint64_t before = now();
        unsigned char byte = *p;
        t->took_ns[i] = (uint32_t)(now() - before);
        t->wrong += byte != MARK;
    }
    return NULL;
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static int target(int argc, char **argv)
{
    if (argc != 9)
        return 2;
    int socket = atoi(argv[2]);
    pin(atoi(argv[3]));
    uint64_t pages = strtoull(argv[4], NULL, 10), ranges = strtoull(argv[5], NULL, 10);
    uint64_t uffds = strtoull(argv[6], NULL, 10), threads = strtoull(argv[7], NULL, 10);
    uint64_t blocks = strtoull(argv[8], NULL, 10);
    uint64_t per_thread = pages / threads, per_range = (pages + ranges - 1) / ranges;
    struct layout layout = {.ranges = ranges, .range_length = per_range * PAGE,
                            .stride = (per_range + (ranges > 1)) * PAGE, .uffds = uffds};
    layout.length = layout.stride * ranges;

    uint32_t *took_ns = malloc(pages * sizeof *took_ns);
    memset(took_ns, 1, pages * sizeof *took_ns); /* our own faults come before the clock */
    struct touching *all = calloc(threads, sizeof *all);
    layout = hand_over(socket, layout);
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
    for (uint64_t i = 0; i < threads; i++) {
        all[i] = (struct touching){.layout = layout, .pages = pages, .thread = i,
                                   .threads = threads, .blocks = blocks,
                                   .took_ns = took_ns + i * per_thread};
        if (pthread_create(&all[i].id, NULL, touch, &all[i]))
            die("pthread_create");
    }
    pthread_barrier_wait(&barrier);
    uint64_t start = now(), wrong = 0, faults = per_thread * threads;
    for (uint64_t i = 0; i < threads; i++) {
        pthread_join(all[i].id, NULL);
        wrong += all[i].wrong;
    }
    double seconds = (double)(now() - start) / 1e9;
    qsort(took_ns, faults, sizeof *took_ns, ascending);
    printf("{\"faults\": %lu, \"wrong\": %lu, \"p50_ns\": %u, \"p90_ns\": %u, \"p99_ns\": %u,"
           " \"max_ns\": %u, \"seconds\": %.9f, \"per_second\": %.1f}\n",
           faults, wrong, took_ns[faults / 2], took_ns[faults * 90 / 100],
           took_ns[faults * 99 / 100], took_ns[faults - 1], seconds, (double)faults / seconds);
    return wrong ? 1 : 0;
}

/* --- the floor --- */

static void register_range(int fd, uint64_t start, uint64_t length)
{
    struct uffdio_register r = {.range = {start, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_REGISTER, &r))
        die("UFFDIO_REGISTER");
}

static void serve(int fd, const unsigned char *page)
{
    struct uffd_msg messages[BATCH];
    ssize_t n = read(fd, messages, sizeof messages);
    if (n < 0 && errno != EAGAIN)
        die("read");
    for (ssize_t i = 0; i < n / (ssize_t)sizeof *messages; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        struct uffdio_copy copy = {.dst = messages[i].arg.pagefault.address & ~(PAGE - 1),
                                   .src = (uint64_t)(uintptr_t)page, .len = PAGE};
        if (ioctl(fd, UFFDIO_COPY, &copy) && errno != EEXIST)
            die("UFFDIO_COPY");
    }
}

static int handler(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int socket = atoi(argv[2]), whole = atoi(argv[4]);
    pin(atoi(argv[3]));
    struct layout layout;
    read_all(socket, &layout, sizeof layout);
    int *fds = calloc(layout.uffds, sizeof *fds);
    receive_fds(socket, fds, layout.uffds);
    unsigned char *page = aligned_alloc(PAGE, PAGE);
    memset(page, MARK, PAGE);
    if (whole)
        register_range(fds[0], layout.start, layout.length);
    else
        for (uint64_t i = 0; i < layout.ranges; i++)
            register_range(fds[i % layout.uffds], layout.start + i * layout.stride,
                           layout.range_length);
    if (write(socket, "g", 1) != 1)
        die("write");
    if (layout.uffds == 1 || whole) {
        struct pollfd poll_fd = {.fd = fds[0], .events = POLLIN};
        while (poll(&poll_fd, 1, -1) >= 0)
            serve(fds[0], page);
        die("poll");
    }
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (uint64_t i = 0; i < layout.uffds; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event))
            die("epoll_ctl");
    }
    struct epoll_event events[BATCH];
    for (int n; (n = epoll_wait(epoll, events, BATCH, -1)) >= 0;)
        for (int i = 0; i < n; i++)
            serve(events[i].data.fd, page);
    die("epoll_wait");
    return 1;
}

/* --- filling without faults --- */

static int idle(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    struct layout layout = {.ranges = 1, .uffds = 1};
    layout.length = layout.stride = layout.range_length = strtoull(argv[3], NULL, 10);
    layout = hand_over(atoi(argv[2]), layout);
    const volatile unsigned char *p = (const volatile unsigned char *)(uintptr_t)layout.start;
    char filled;
    read_all(atoi(argv[2]), &filled, 1); /* 'f': filled, look at it; 'x': do not touch it */
    uint64_t wrong = 0;
    if (filled == 'f')
        for (uint64_t i = 0; i < layout.length; i += PAGE)
            wrong += p[i] != MARK;
    printf("{\"wrong\": %lu}\n", wrong);
    return wrong ? 1 : 0;
}

static int bulk(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int socket = atoi(argv[2]), fd;
    uint64_t piece = strtoull(argv[4], NULL, 10);
    pin(atoi(argv[3]));
    struct layout layout;
    read_all(socket, &layout, sizeof layout);
    receive_fds(socket, &fd, 1);
    register_range(fd, layout.start, layout.length);
    /* A large source would measure how fast the machine finds memory that it never had. */
    uint64_t held = layout.length < BULK_SOURCE ? layout.length : BULK_SOURCE;
    unsigned char *data = malloc(held);
    memset(data, MARK, held);
    if (write(socket, "g", 1) != 1)
        die("write");
    uint64_t start = now();
    for (uint64_t done = 0; done < layout.length;) {
        uint64_t from = done % held, rest = held - from;
        struct uffdio_copy copy = {.dst = layout.start + done,
                                   .src = (uint64_t)(uintptr_t)data + from,
                                   .len = rest < piece ? rest : piece};
        if (copy.len > layout.length - done)
            copy.len = layout.length - done;
        if (ioctl(fd, UFFDIO_COPY, &copy))
            die("UFFDIO_COPY");
        done += (uint64_t)copy.copy;
    }
    double seconds = (double)(now() - start) / 1e9;
    printf("{\"bytes\": %lu, \"seconds\": %.9f}\n", layout.length, seconds);
    fflush(stdout);
    if (write(socket, "f", 1) != 1)
        die("write");
    return 0;
}

int main(int argc, char **argv)
{
    struct rlimit files;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody outlives the measurement */
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    const char *role = argc > 1 ? argv[1] : "";
    int status = !strcmp(role, "target")    ? target(argc, argv)
                 : !strcmp(role, "handler") ? handler(argc, argv)
                 : !strcmp(role, "idle")    ? idle(argc, argv)
                 : !strcmp(role, "bulk")    ? bulk(argc, argv)
                                            : 2;
    if (status == 2)
        fprintf(stderr, "usage: see the first lines of floor.c\n");
    return status;
}
