/* The process that a soak test serves: threads that do everything at random to lazily served memory
 * and know at every moment what each byte must be.
 *
 * usage: soak_target SOCKET CONTROL KIND THREADS PAGES PAGE_SIZE SEED OPERATIONS LIFE FEATURES ALARM_US
 *
 * SOCKET    gets "BASE LENGTH" and beside it the userfaultfd; one byte from it means go.  If it is a
 *           path, `aiouffd serve` listens there, and gets what Firecracker sends; if it is
 *           criu:FD:PID:BASE, the daemon of `criu restore` is connected to FD, gets what a task that
 *           was PID sends, and has an image of the memory at BASE.  No page is lost then.
 * CONTROL   is a memory file of struct control, shared with the server.
 * KIND      anon, shmem (shared mapping of a memfd), shmem-private, hugetlb (shared).
 * OPERATIONS is a string of letters with weights, "r30w10...": see do_operation.
 * LIFE      is how many operations a thread does; 0 is until control.stop.
 *
 * Laws: each thread owns a slice of the pages and changes no other; its model of the bytes lies in
 * memory of its own.  Page N of the image holds N + 1 in each of its words.  Page 63 of every 64 is
 * one that the server cannot answer: it must be SIGBUS until it is removed.  Nothing allocates after
 * the start, since a fork that waits for its event holds the allocator's locks; nothing maps memory
 * without a fixed address, since moves leave holes that are filled again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mman.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_THREADS 16

struct control { /* the Python side has the same layout */
    volatile uint64_t stop, closing, errors, checked, forks, moves, removals, sigbus;
    volatile uint64_t telling; /* somebody writes the message, or has */
    volatile uint64_t progress[2 * MAX_THREADS]; /* per thread, then of its forked children */
    volatile uint64_t doing[2 * MAX_THREADS];    /* the letter of the operation under way */
    char message[1024];
};

enum state { IMAGE, ZERO, SHADOW, LOST };

struct worker {
    pthread_t thread;
    int number, slot, scratch, depth;
    uint64_t random;
    pid_t child;
    unsigned char *state, *away;
    char *shadow, *bounce;
    sigjmp_buf escape;
    volatile sig_atomic_t guarded;
};

struct uffdio_api { uint64_t api, features, ioctls; };
struct uffdio_register { uint64_t start, length, mode, ioctls; };

static struct control *control;
static struct worker workers[MAX_THREADS];
static char *home_base, *away_base;
static size_t page_size, pages, threads;
static int shared, is_anon, life, pattern;
static const char *server; /* the path of its socket, or what else says where it is, or none */
static char *wanted_base; /* where the memory has to be, if that is not free */
static int task; /* the pid that CRIU knows us by */
static char letters[32];
static unsigned weights[32], weight_sum, letter_count;
static __thread struct worker *self;

static void die(const char *what)
{
    dprintf(2, "soak_target %d: %s: %s\n", (int)getpid(), what, strerror(errno));
    _exit(70);
}

static void wrong(const char *format, ...)
{
    char text[512];
    va_list rest;
    va_start(rest, format);
    vsnprintf(text, sizeof(text), format, rest);
    va_end(rest);
    if (__sync_bool_compare_and_swap(&control->telling, 0, 1)) {
        snprintf(control->message, sizeof(control->message), "process %d depth %d thread %d: %s",
                 (int)getpid(), self ? self->depth : 0, self ? self->number : -1, text);
        __sync_fetch_and_add(&control->errors, 1); /* last: who sees it reads the message */
    }
    dprintf(2, "soak_target %d: %s\n", (int)getpid(), text);
}

static uint64_t random_number(void)
{
    uint64_t x = self->random += 0x9E3779B97F4A7C15u; /* splitmix64 */
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static size_t below(size_t limit) { return random_number() % limit; }

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (number == SIGALRM)
        return;
    if (self && self->guarded) {
        self->guarded = 0;
        siglongjmp(self->escape, 1);
    }
    wrong("signal %d at %p", number, info->si_addr);
    _exit(71);
}

static size_t index_of(size_t page) { return self->number * pages + page; }

/* Pages move by blocks that are one mapping always: a move of several mappings may do a part. */
#define BLOCK 8

/* Away from home blocks lie in another order: neighbours there are no neighbours in the image. */
static char *address_of(size_t page)
{
    if (self->away[page])
        return away_base + (index_of(page) ^ BLOCK) * page_size;
    return home_base + index_of(page) * page_size;
}

static char *shadow_of(size_t page) { return self->shadow + page * page_size; }

/* Say whether a SIGBUS at a page is right, and count it. */
static int may_be_lost(size_t page)
{
    unsigned char state = self->state[page];
    __sync_fetch_and_add(&control->sigbus, 1);
    if (state == LOST)
        return 1;
    /* A mark made by the close stays when a page of shared memory is removed after it. */
    return control->closing && (state == IMAGE || (shared && state == ZERO));
}

static __attribute__((noinline)) void compare(size_t page, const char *at)
{
    const uint64_t *words = (const uint64_t *)at;
    uint64_t expected = self->state[page] == IMAGE ? index_of(page) + 1 : 0;
    if (self->state[page] == SHADOW) {
        if (memcmp(at, shadow_of(page), page_size))
            wrong("page %zu at %p is not as it was written: %lx, not %lx", index_of(page),
                  (void *)at, (long)words[0], *(long *)shadow_of(page));
        return;
    }
    for (size_t word = 0; word < page_size / 8; word++)
        if (words[word] != expected) {
            wrong("page %zu in state %d at %p: word %zu is %lx, not %lx", index_of(page),
                  self->state[page], (void *)at, word, (long)words[word], (long)expected);
            return;
        }
    if (self->state[page] == LOST)
        wrong("page %zu at %p cannot be answered, yet it was", index_of(page), (void *)at);
}

/* Compare every byte of a page with what it must be. */
static void check_at(size_t page, const char *at)
{
    if (sigsetjmp(self->escape, 1)) {
        if (!may_be_lost(page))
            wrong("page %zu in state %d: SIGBUS at %p, closing %d", index_of(page),
                  self->state[page], (void *)at, (int)control->closing);
        return;
    }
    self->guarded = 1;
    compare(page, at);
    self->guarded = 0;
    __sync_fetch_and_add(&control->checked, page_size);
}

static void check(size_t page) { check_at(page, address_of(page)); }

/* Bring a page's model to one that is compared byte by byte. */
static void into_shadow(size_t page)
{
    uint64_t *words = (uint64_t *)shadow_of(page);
    if (self->state[page] == SHADOW)
        return;
    for (size_t word = 0; word < page_size / 8; word++)
        words[word] = self->state[page] == IMAGE ? index_of(page) + 1 : 0;
    self->state[page] = SHADOW;
}

static __attribute__((noinline)) void store(char *at, size_t first, size_t count, uint64_t value)
{
    for (size_t word = first; word < first + count; word++)
        ((volatile uint64_t *)at)[word] = value + word;
}

static void write_page(size_t page)
{
    const uint64_t value = random_number();
    const size_t count = below(4) ? 1 : page_size / 8;
    const size_t first = count == 1 ? below(page_size / 8) : 0;
    if (sigsetjmp(self->escape, 1)) {
        if (!may_be_lost(page))
            wrong("page %zu in state %d: SIGBUS for a write", index_of(page), self->state[page]);
        return;
    }
    self->guarded = 1;
    store(address_of(page), first, count, value);
    self->guarded = 0;
    into_shadow(page);
    store(shadow_of(page), first, count, value);
}

/* The kernel reads a page for us: a system call in a fault, which signals make repeat itself. */
static void kernel_reads(size_t page)
{
    size_t length = 4096;
    ssize_t done = pwrite(self->scratch, address_of(page), length, 4096 * self->depth);
    if (done != (ssize_t)length) {
        if (!may_be_lost(page))
            wrong("page %zu in state %d: write gave %zd, %s", index_of(page), self->state[page],
                  done, strerror(errno));
        return;
    }
    if (pread(self->scratch, self->bounce, length, 4096 * self->depth) != (ssize_t)length)
        wrong("the scratch file cannot be read: %s", strerror(errno));
    if (self->state[page] == SHADOW) {
        if (memcmp(self->bounce, shadow_of(page), length))
            wrong("page %zu as the kernel read it is not as written", index_of(page));
        return;
    }
    uint64_t expected = self->state[page] == IMAGE ? index_of(page) + 1 : 0;
    for (size_t word = 0; word < length / 8; word++)
        if (((uint64_t *)self->bounce)[word] != expected) {
            wrong("page %zu in state %d as the kernel read it: word %zu is %lx", index_of(page),
                  self->state[page], word, (long)((uint64_t *)self->bounce)[word]);
            break;
        }
}

static void kernel_writes(size_t page)
{
    ssize_t done = pread(pattern, address_of(page), 4096, 0);
    if (done != 4096) {
        if (!may_be_lost(page))
            wrong("page %zu in state %d: read gave %zd, %s", index_of(page), self->state[page],
                  done, strerror(errno));
        return;
    }
    into_shadow(page);
    memset(shadow_of(page), 0x5A, 4096);
}

static size_t run_from(size_t page)
{
    return 1 + below(BLOCK - page % BLOCK);
}

static int in_shared_child(void) { return shared && self->depth; }

/* In shared memory a parent and its children agree on pages that nobody changes. */
static int is_constant(size_t page) { return shared && page % 4 == 1; }

static void remove_pages(size_t page)
{
    size_t count = shared ? 1 : run_from(page);
    /* In shared memory the kernel keeps a poison mark through MADV_REMOVE. */
    if (is_constant(page) || (shared && page % 64 == 63))
        return;
    if (madvise(address_of(page), count * page_size, shared ? MADV_REMOVE : MADV_DONTNEED))
        wrong("madvise of page %zu: %s", index_of(page), strerror(errno));
    memset(self->state + page, ZERO, count);
    __sync_fetch_and_add(&control->removals, 1);
}

static void reserve_again(char *old, size_t length, int over)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (over ? MAP_FIXED : MAP_FIXED_NOREPLACE);
    if (mmap(old, length, PROT_NONE, flags, -1, 0) != old)
        wrong("the place of a move is taken: %s", strerror(errno));
}

static void move_pages(size_t page, int leave)
{
    const size_t count = BLOCK;
    page = page / BLOCK * BLOCK;
    char *old = address_of(page), *new;
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (leave ? MREMAP_DONTUNMAP : 0);
    self->away[page] ^= 1;
    new = address_of(page);
    self->away[page] ^= 1;
    if (mremap(old, count * page_size, count * page_size, flags, new) != new) {
        wrong("mremap of %zu pages at %zu: %s", count, index_of(page), strerror(errno));
        return;
    }
    for (size_t i = 0; i < count; i++)
        self->away[page + i] ^= 1;
    if (leave) { /* what was left behind is empty memory */
        unsigned char state = self->state[page];
        self->state[page] = ZERO;
        check_at(page, old);
        self->state[page] = state;
    }
    reserve_again(old, count * page_size, leave);
    __sync_fetch_and_add(&control->moves, 1);
}

static void protect_pages(size_t page)
{
    size_t count = run_from(page);
    char *at = address_of(page);
    if (mprotect(at, count * page_size, PROT_READ))
        wrong("mprotect: %s", strerror(errno));
    if (!in_shared_child() || is_constant(page))
        check(page);
    if (mprotect(at, count * page_size, PROT_READ | PROT_WRITE))
        wrong("mprotect: %s", strerror(errno));
}

static void do_operation(char letter);

static char pick(void)
{
    size_t at = below(weight_sum), i = 0;
    while (at >= weights[i])
        at -= weights[i++];
    return letters[i];
}

static void reap(void)
{
    int status = 0;
    if (self->child <= 0)
        return;
    while (waitpid(self->child, &status, 0) < 0)
        if (errno != EINTR)
            wrong("waitpid: %s", strerror(errno));
    if (status)
        wrong("a forked child ended with status %x", status);
    self->child = 0;
}

static void fork_child(void)
{
    reap();
    pid_t pid = fork();
    if (pid < 0)
        wrong("fork: %s", strerror(errno));
    if (pid != 0) {
        self->child = pid;
        return;
    }
    self->child = 0;
    self->depth++;
    self->slot = MAX_THREADS + self->number;
    for (size_t i = 0; i < 24; i++)
        do_operation(pick());
    for (size_t i = 0; i < 24; i++) {
        size_t page = below(pages);
        check(shared ? page / 4 * 4 + 1 : page);
    }
    reap();
    __sync_fetch_and_add(&control->forks, 1);
    _exit(control->errors ? 1 : 0);
}

static void do_operation(char letter)
{
    size_t page = below(pages);
    if (in_shared_child()) {
        page = page / 4 * 4 + 1;
        if (!strchr("rmp", letter))
            letter = 'r';
    }
    control->doing[self->slot] = letter;
    switch (letter) {
    case 'r': check(page); break;
    case 'n': /* neighbours, as a program that reads on */
        for (size_t i = 0; i < 32 && page + i < pages; i++)
            check(page + i);
        break;
    case 'w': if (!is_constant(page)) write_page(page); break;
    case 'k': kernel_reads(page); break;
    case 'K': if (!is_constant(page)) kernel_writes(page); break;
    case 'd': remove_pages(page); break;
    case 'm': move_pages(page, 0); break;
    case 'u': move_pages(page, is_anon); break;
    case 'p': protect_pages(page); break;
    case 'f': if (self->depth < 2) fork_child(); break;
    case 'x': _exit(0);
    default: die("an unknown operation");
    }
    control->progress[self->slot]++;
}

static void *work(void *argument)
{
    self = argument;
    for (int i = 0; (!life || i < life) && !control->stop && !control->errors; i++)
        do_operation(pick());
    for (size_t page = 0; page < pages; page++) { /* in the end, every byte */
        control->doing[self->slot] = 'e';
        check(page);
        control->progress[self->slot]++;
    }
    reap();
    control->doing[self->slot] = 0;
    return NULL;
}

static void *own_memory(size_t length)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static char *aligned(size_t length, int protection, int flags, int fd)
{
    if (wanted_base) {
        char *at = mmap(wanted_base, length, protection, flags | MAP_FIXED_NOREPLACE, fd, 0);
        if (at != wanted_base)
            die("mmap of the memory where it was");
        wanted_base = NULL;
        return at;
    }
    char *room = mmap(NULL, length + page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
    char *at = (char *)(((uintptr_t)room + page_size - 1) / page_size * page_size);
    if (room == MAP_FAILED || mmap(at, length, protection, flags | MAP_FIXED, fd, 0) != at)
        die("mmap of the memory");
    return at;
}

static void make_memory(const char *kind)
{
    size_t length = threads * pages * page_size;
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    is_anon = !strcmp(kind, "anon");
    shared = !strcmp(kind, "shmem") || !strcmp(kind, "hugetlb");
    if (!is_anon) {
        fd = memfd_create("soak", MFD_CLOEXEC | (page_size > 4096 ? MFD_HUGETLB : 0));
        if (fd < 0 || ftruncate(fd, length))
            die("memfd");
        flags = shared ? MAP_SHARED : MAP_PRIVATE;
    }
    home_base = aligned(length, PROT_READ | PROT_WRITE, flags, fd);
    away_base = aligned(length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
}

static void hand_over(int socket, uint64_t features)
{
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {0xAA, features, 0};
    char text[256], byte;
    union { struct cmsghdr header; char bytes[CMSG_SPACE(sizeof(int))]; } ancillary = {0};
    struct iovec part = {text, 0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                             .msg_controllen = sizeof(ancillary.bytes)};
    if (uffd < 0 || ioctl(uffd, _IOWR(0xAA, 0x3F, struct uffdio_api), &api))
        die("userfaultfd");
    struct uffdio_register all = {(uint64_t)home_base, threads * pages * page_size, 1, 0};
    if (server && !task && ioctl(uffd, _IOWR(0xAA, 0x00, struct uffdio_register), &all))
        die("register");
    if (task) {
        if (write(socket, &task, sizeof(task)) != sizeof(task))
            die("write");
        text[0] = 0;
        part.iov_len = 1;
    } else if (server)
        part.iov_len = snprintf(text, sizeof(text),
                                "[{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":0,"
                                "\"page_size\":%lu,\"page_size_kib\":%lu}]",
                                (unsigned long)home_base, (unsigned long)(threads * pages * page_size),
                                page_size, page_size);
    else
        part.iov_len = snprintf(text, sizeof(text), "%lu %lu", (unsigned long)home_base,
                                (unsigned long)(threads * pages * page_size));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &uffd, sizeof(int));
    if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0)
        die("sendmsg");
    if (task) { /* as CRIU: long after the hand-over */
        usleep(20000);
        if (ioctl(uffd, _IOWR(0xAA, 0x00, struct uffdio_register), &all))
            die("register");
        close(socket);
    }
    close(uffd);
    if (server)
        return;
    if (read(socket, &byte, 1) != 1)
        _exit(0); /* the server is gone */
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
        die("connect");
    return fd;
}

int main(int count, char **arguments)
{
    if (count != 12)
        die("arguments");
    int socket = atoi(arguments[1]), control_fd = atoi(arguments[2]);
    unsigned long base = 0;
    if (arguments[1][0] == '/')
        socket = connect_to(server = arguments[1]);
    else if (sscanf(arguments[1], "criu:%d:%d:%lu", &socket, &task, &base) == 3)
        server = arguments[1];
    wanted_base = (char *)base;
    threads = strtoul(arguments[4], NULL, 0);
    pages = strtoul(arguments[5], NULL, 0);
    page_size = strtoul(arguments[6], NULL, 0);
    uint64_t seed = strtoull(arguments[7], NULL, 0);
    for (char *at = arguments[8]; *at && letter_count < 32;) {
        letters[letter_count] = *at++;
        weight_sum += weights[letter_count++] = strtoul(at, &at, 10);
    }
    life = atoi(arguments[9]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (control == MAP_FAILED || !threads || threads > MAX_THREADS || !weight_sum)
        die("arguments");

    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGALRM, &action, NULL);

    char bytes[4096];
    memset(bytes, 0x5A, sizeof(bytes));
    pattern = memfd_create("pattern", MFD_CLOEXEC);
    if (pwrite(pattern, bytes, sizeof(bytes), 0) != sizeof(bytes))
        die("the pattern");
    make_memory(arguments[3]);
    for (size_t i = 0; i < threads; i++) {
        struct worker *worker = &workers[i];
        worker->number = worker->slot = i;
        worker->random = seed * MAX_THREADS + i;
        worker->scratch = memfd_create("scratch", MFD_CLOEXEC);
        worker->state = own_memory(pages);
        worker->away = own_memory(pages);
        worker->shadow = own_memory(pages * page_size);
        worker->bounce = own_memory(4096);
        for (size_t page = 0; page < pages; page++)
            worker->state[page] = !server && page % 64 == 63 ? LOST : IMAGE;
    }
    hand_over(socket, strtoull(arguments[10], NULL, 0));
    /* A mapping that never had a page of its own is forked without its poison marks, by the kernel. */
    self = &workers[0];
    check(0);
    self = NULL;

    int alarm_us = atoi(arguments[11]);
    struct itimerval every = {{0, alarm_us}, {0, alarm_us}};
    for (size_t i = 0; i < threads; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die("pthread_create");
    if (alarm_us)
        setitimer(ITIMER_REAL, &every, NULL);
    for (size_t i = 0; i < threads; i++)
        pthread_join(workers[i].thread, NULL);
    return control->errors ? 1 : 0;
}
