/* The process that faults, for tests: it does what it is told over a socket, in many threads.
 *
 * usage: target CONTROL_FD THREADS [SEQUENCE]
 *
 * CONTROL_FD is a SOCK_SEQPACKET socket.  A command is one message, "SEQUENCE THREAD WORD ARGS..."
 * with numbers as strtoull reads them; its answer is one message, "SEQUENCE WORD ARGS...", sent by
 * the thread that did it, with a file descriptor beside it where there is one to hand over.
 * THREAD -1 is the control thread, which never touches memory that may fault.  The first answer
 * (SEQUENCE, or 0) is "ready PID TID...".  End of file on the socket ends the process.
 *
 * Laws: nothing here allocates after the start, since a fork that waits for its event holds the
 * allocator's locks; SIGBUS and SIGSEGV of a guarded access are results, elsewhere they kill.
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
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 96
#define COMMAND_BYTES 512
#define ANSWER_BYTES (128 * 1024)
#define MAX_SHADOW 65536

struct uffdio_api { uint64_t api, features, ioctls; };
#define UFFD_API 0xAAULL
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)

struct worker {
    pthread_t thread;
    pid_t tid;
    int commands[2];
    sigjmp_buf escape;
    volatile sig_atomic_t guarded;
    volatile int signal_number, signal_code;
    void *volatile signal_address;
    volatile uint64_t signals; /* caught SIGUSR1, SIGUSR2, SIGPROF, SIGALRM, SIGCHLD */
    char answer[ANSWER_BYTES];
};

static struct worker workers[MAX_THREADS];
static int worker_count;
static int control;
static volatile int stop; /* bit 0 ends storms, lockers and pelters; bit 1 churners */
static uint64_t shadow[MAX_SHADOW];
static char control_answer[ANSWER_BYTES];
static __thread struct worker *self;
static __thread char *answer = control_answer;

static void die(const char *what)
{
    fprintf(stderr, "target %d: %s: %s\n", (int)getpid(), what, strerror(errno));
    _exit(70);
}

static int send_with_fd(int socket, const char *text, size_t length, int fd)
{
    union { struct cmsghdr header; char bytes[CMSG_SPACE(sizeof(int))]; } ancillary;
    struct iovec part = {(void *)text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        memset(&ancillary, 0, sizeof(ancillary));
        message.msg_control = ancillary.bytes;
        message.msg_controllen = sizeof(ancillary.bytes);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof(int));
    }
    while (sendmsg(socket, &message, MSG_NOSIGNAL) < 0)
        if (errno != EINTR)
            return -1;
    return 0;
}

static void send_answer(const char *text, size_t length, int fd)
{
    if (send_with_fd(control, text, length, fd))
        _exit(71); /* nobody listens any more */
}

static void reply_fd(uint64_t sequence, int fd, const char *format, ...)
{
    int length = snprintf(answer, ANSWER_BYTES, "%llu ", (unsigned long long)sequence);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(answer + length, ANSWER_BYTES - length, format, arguments);
    va_end(arguments);
    send_answer(answer, length, fd);
}

#define reply(sequence, ...) reply_fd(sequence, -1, __VA_ARGS__)

/* --- signals --------------------------------------------------------------------------- */

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (!self || !self->guarded) {
        signal(number, SIG_DFL);
        return; /* the access is tried again and kills */
    }
    self->signal_number = number;
    self->signal_code = info->si_code;
    self->signal_address = info->si_addr;
    self->guarded = 0;
    siglongjmp(self->escape, 1);
}

static void on_signal(int number)
{
    (void)number;
    if (self)
        self->signals++;
}

static void install_handlers(void)
{
    static const int counted[] = {SIGUSR1, SIGUSR2, SIGPROF, SIGALRM};
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    for (size_t i = 0; i < sizeof(counted) / sizeof(counted[0]); i++)
        sigaction(counted[i], &action, NULL);
    action.sa_flags = SA_RESTART | SA_NOCLDWAIT; /* nobody waits for children here */
    sigaction(SIGCHLD, &action, NULL);
}

/* Run ACCESS; 1 if it went through, 0 if a signal stopped it. */
#define GUARDED(access) \
    (sigsetjmp(self->escape, 0) ? 0 : (self->guarded = 1, (access), self->guarded = 0, 1))

static void reply_signal(uint64_t sequence)
{
    reply(sequence, "signal %d %d %llu", self->signal_number, self->signal_code,
          (unsigned long long)(uintptr_t)self->signal_address);
}

/* --- commands -------------------------------------------------------------------------- */

static const struct { const char *name; long number; } calls[] = {
    {"mmap", SYS_mmap}, {"munmap", SYS_munmap}, {"mremap", SYS_mremap},
    {"mprotect", SYS_mprotect}, {"madvise", SYS_madvise}, {"read", SYS_read},
    {"write", SYS_write}, {"pread", SYS_pread64}, {"pwrite", SYS_pwrite64},
    {"ftruncate", SYS_ftruncate}, {"fallocate", SYS_fallocate}, {"close", SYS_close},
    {"mlock", SYS_mlock}, {"munlock", SYS_munlock}, {"prctl", SYS_prctl}, {"dup", SYS_dup},
    {"io_uring_setup", SYS_io_uring_setup}, {"io_uring_register", SYS_io_uring_register},
    {"kill", SYS_kill}, {"ioctl", SYS_ioctl}, {"futex", SYS_futex}, {"unshare", SYS_unshare},
    {"setresuid", SYS_setresuid}, {"vmsplice", SYS_vmsplice}, {"fcntl", SYS_fcntl},
    {"pidfd_open", SYS_pidfd_open}, {"pidfd_getfd", SYS_pidfd_getfd},
};

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state += 0x9E3779B97F4A7C15ULL; /* splitmix64 */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

static uint32_t crc32_of(uint32_t crc, const volatile unsigned char *bytes, size_t length)
{
    static uint32_t table[256];
    if (!table[1]) /* every thread writes the same numbers; entry 1 last */
        for (int i = 255; i >= 0; i--) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++)
                c = c & 1 ? 0xEDB88320U ^ (c >> 1) : c >> 1;
            table[i] = c;
        }
    crc = ~crc;
    while (length--)
        crc = table[(crc ^ *bytes++) & 0xFF] ^ (crc >> 8);
    return ~crc;
}

static void number_pages(uint64_t address, uint64_t step, uint64_t count, uint64_t first)
{
    for (uint64_t i = 0; i < count; i++)
        *(volatile uint64_t *)(uintptr_t)(address + i * step) = first + i;
}

static void serve(uint64_t sequence) __attribute__((noreturn));

static void do_fork(uint64_t sequence)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        reply(sequence, "value %lld", (long long)-errno);
        return;
    }
    pid_t pid = fork();
    if (pid == 0) {
        close(pair[0]);
        close(control);
        for (int i = 0; i < worker_count; i++) {
            close(workers[i].commands[0]);
            close(workers[i].commands[1]);
        }
        control = pair[1];
        self = NULL;
        answer = control_answer;
        stop = 0;
        serve(0);
    }
    int number = errno;
    close(pair[1]);
    if (pid < 0)
        reply(sequence, "value %lld", (long long)-number);
    else
        reply_fd(sequence, pair[0], "value %lld", (long long)pid);
    close(pair[0]);
}

static void do_open(uint64_t sequence, uint64_t features, uint64_t flags, int keep)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = -1;
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        close(device);
    }
    if (fd < 0)
        fd = syscall(SYS_userfaultfd, flags);
    if (fd < 0) {
        reply(sequence, "value %lld", (long long)-errno);
        return;
    }
    struct uffdio_api api = {UFFD_API, features, 0};
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        reply(sequence, "value %lld", (long long)-errno);
        close(fd);
        return;
    }
    reply_fd(sequence, fd, "value %d", keep ? fd : -1);
    if (!keep)
        close(fd);
}

static void do_hand(uint64_t sequence, int socket, int32_t pid, int fd)
{
    int failed = send_with_fd(socket, (char *)&pid, sizeof(pid), -1);
    if (!failed && fd >= 0)
        failed = send_with_fd(socket, "", 1, fd);
    close(fd);
    reply(sequence, "value %d", failed ? -errno : 0);
}

/* One u64 at the start of each of COUNT pages, "x" where a signal stopped the access. */
static void do_words(uint64_t sequence, uint64_t address, uint64_t step, uint64_t count)
{
    volatile size_t length = snprintf(answer, ANSWER_BYTES, "%llu words",
                                      (unsigned long long)sequence);
    for (volatile uint64_t i = 0; i < count && length + 20 < ANSWER_BYTES; i++) {
        volatile uint64_t word = 0;
        if (GUARDED(word = *(volatile uint64_t *)(uintptr_t)(address + i * step)))
            length += snprintf(answer + length, ANSWER_BYTES - length, " %llx",
                               (unsigned long long)word);
        else
            length += snprintf(answer + length, ANSWER_BYTES - length, " x");
    }
    send_answer(answer, length, -1);
}

/* Read COUNT random pages; the u64 in each must be its page number plus one, or zero where
 * ZERO_OK; answers how many were right, zero, wrong and stopped by a signal. */
static void do_storm(uint64_t sequence, uint64_t address, uint64_t step, uint64_t pages,
                     uint64_t seed, uint64_t count)
{
    volatile uint64_t state = seed, right = 0, zero = 0, wrong = 0, stopped = 0;
    for (volatile uint64_t i = 0; i < count && !(stop & 1); i++) {
        uint64_t random_state = state;
        volatile uint64_t page = next_random(&random_state) % pages;
        state = random_state;
        volatile uint64_t word = 0;
        if (!GUARDED(word = *(volatile uint64_t *)(uintptr_t)(address + page * step)))
            stopped++;
        else if (word == page + 1)
            right++;
        else if (word == 0)
            zero++;
        else
            wrong++;
    }
    reply(sequence, "values %llu %llu %llu %llu", (unsigned long long)right,
          (unsigned long long)zero, (unsigned long long)wrong, (unsigned long long)stopped);
}

/* Take the mutex that lives in a page, compare the page's counter with its shadow, count up. */
static void do_locker(uint64_t sequence, uint64_t address, uint64_t step, uint64_t pages,
                      uint64_t seed, uint64_t rounds)
{
    uint64_t state = seed, wrong = 0, done = 0;
    for (; done < rounds && !(stop & 1); done++) {
        uint64_t page = seed ? next_random(&state) % pages : done % pages;
        char *start = (char *)(uintptr_t)(address + page * step);
        pthread_mutex_t *mutex = (pthread_mutex_t *)start;
        volatile uint64_t *counter = (volatile uint64_t *)(start + 64);
        pthread_mutex_lock(mutex);
        if (*counter != shadow[page])
            wrong++;
        *counter += 1;
        shadow[page] = *counter;
        pthread_mutex_unlock(mutex);
    }
    reply(sequence, "values %llu %llu", (unsigned long long)done, (unsigned long long)wrong);
}

/* Count on, together with the other threads that do, until told to stop: each number is written to
 * its slot, one after the other.  So at any instant the slots hold the last numbers, all of them.
 */
static void do_count(uint64_t sequence, uint64_t address, uint64_t step, uint64_t slots)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static uint64_t number;
    uint64_t mine = 0;
    for (; !(stop & 1); mine++) {
        pthread_mutex_lock(&mutex);
        number++;
        *(volatile uint64_t *)(uintptr_t)(address + number % slots * step) = number;
        pthread_mutex_unlock(&mutex);
    }
    reply(sequence, "value %llu", (unsigned long long)mine);
}

static void do_pelt(uint64_t sequence, uint64_t thread, int number, uint64_t count,
                    uint64_t pause_us)
{
    struct timespec pause = {pause_us / 1000000, pause_us % 1000000 * 1000};
    uint64_t sent = 0;
    for (; sent < count && !(stop & 1); sent++) {
        pthread_kill(workers[thread].thread, number);
        if (pause_us)
            nanosleep(&pause, NULL);
    }
    reply(sequence, "value %llu", (unsigned long long)sent);
}

/* madvise random pages until told to stop; answers how often. */
static void do_churn(uint64_t sequence, uint64_t address, uint64_t step, uint64_t pages,
                     int advice, uint64_t seed, uint64_t pause_us)
{
    struct timespec pause = {pause_us / 1000000, pause_us % 1000000 * 1000};
    uint64_t state = seed, count = 0;
    for (; !(stop & 2); count++) {
        uint64_t page = next_random(&state) % pages;
        if (madvise((void *)(uintptr_t)(address + page * step), step, advice)) {
            reply(sequence, "value %lld", (long long)-errno);
            return;
        }
        if (pause_us)
            nanosleep(&pause, NULL);
    }
    reply(sequence, "value %llu", (unsigned long long)count);
}

/* mremap a range to and fro until told to stop; answers how often. */
static void do_shuttle(uint64_t sequence, uint64_t here, uint64_t there, uint64_t length,
                       uint64_t pause_us)
{
    struct timespec pause = {pause_us / 1000000, pause_us % 1000000 * 1000};
    uint64_t count = 0;
    for (; !(stop & 2) || count % 2; count++) {
        void *from = (void *)(uintptr_t)(count % 2 ? there : here);
        void *to = (void *)(uintptr_t)(count % 2 ? here : there);
        if (mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
            reply(sequence, "value %lld", (long long)-errno);
            return;
        }
        if (pause_us)
            nanosleep(&pause, NULL);
    }
    reply(sequence, "value %llu", (unsigned long long)count);
}

static void do_exec(uint64_t sequence)
{
    char fd[16], threads[16], number[24];
    snprintf(fd, sizeof(fd), "%d", control);
    snprintf(threads, sizeof(threads), "%d", worker_count);
    snprintf(number, sizeof(number), "%llu", (unsigned long long)sequence);
    char *arguments[] = {"target", fd, threads, number, NULL};
    fcntl(control, F_SETFD, 0);
    execv("/proc/self/exe", arguments);
    reply(sequence, "value %lld", (long long)-errno);
}

static void perform(uint64_t sequence, char *command)
{
    char *rest, *word = strtok_r(command, " ", &rest), *token;
    uint64_t n[8] = {0};
    char *name = NULL;
    if (!strcmp(word, "call") || !strcmp(word, "memfd") || !strcmp(word, "open"))
        name = strtok_r(NULL, " ", &rest);
    for (int i = 0; i < 8 && (token = strtok_r(NULL, " ", &rest)); i++)
        n[i] = strtoull(token, NULL, 0);

    if (!strcmp(word, "peek")) {
        volatile unsigned value = 0;
        if (GUARDED(value = *(volatile unsigned char *)(uintptr_t)n[0]))
            reply(sequence, "value %u", value);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "poke")) {
        if (GUARDED(*(volatile unsigned char *)(uintptr_t)n[0] = (unsigned char)n[1]))
            reply(sequence, "value %u", (unsigned)n[1]);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "poke64")) {
        if (GUARDED(*(volatile uint64_t *)(uintptr_t)n[0] = n[1]))
            reply(sequence, "value %llu", (unsigned long long)n[1]);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "number")) { /* page i of COUNT gets the u64 FIRST + i */
        if (GUARDED(number_pages(n[0], n[1], n[2], n[3])))
            reply(sequence, "value %llu", (unsigned long long)n[2]);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "fill")) {
        if (GUARDED(memset((void *)(uintptr_t)n[0], (int)n[2], n[1])))
            reply(sequence, "value %llu", (unsigned long long)n[1]);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "crc32")) {
        volatile uint32_t crc = 0;
        if (GUARDED(crc = crc32_of(0, (unsigned char *)(uintptr_t)n[0], n[1])))
            reply(sequence, "value %lu", (unsigned long)crc);
        else
            reply_signal(sequence);
    } else if (!strcmp(word, "words")) {
        do_words(sequence, n[0], n[1], n[2]);
    } else if (!strcmp(word, "storm")) {
        do_storm(sequence, n[0], n[1], n[2], n[3], n[4]);
    } else if (!strcmp(word, "locker")) {
        do_locker(sequence, n[0], n[1], n[2], n[3], n[4]);
    } else if (!strcmp(word, "churn")) {
        do_churn(sequence, n[0], n[1], n[2], (int)n[3], n[4], n[5]);
    } else if (!strcmp(word, "shuttle")) {
        do_shuttle(sequence, n[0], n[1], n[2], n[3]);
    } else if (!strcmp(word, "count")) {
        do_count(sequence, n[0], n[1], n[2]);
    } else if (!strcmp(word, "pelt")) {
        do_pelt(sequence, n[0], (int)n[1], n[2], n[3]);
    } else if (!strcmp(word, "call")) {
        for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++)
            if (!strcmp(name, calls[i].name)) {
                long result = syscall(calls[i].number, n[0], n[1], n[2], n[3], n[4], n[5]);
                reply(sequence, "value %lld", (long long)(result == -1 ? -errno : result));
                return;
            }
        reply(sequence, "unknown call %s", name);
    } else if (!strcmp(word, "memfd")) {
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | n[0]);
        if (fd < 0 || ftruncate(fd, n[1]) < 0)
            reply(sequence, "value %lld", (long long)-errno);
        else
            reply_fd(sequence, fd, "value %d", fd);
    } else if (!strcmp(word, "open")) {
        int fd = open(name, O_RDWR | O_CLOEXEC);
        reply(sequence, "value %d", fd < 0 ? -errno : fd);
    } else if (!strcmp(word, "uffd")) {
        do_open(sequence, n[0], n[1], (int)n[2]);
    } else if (!strcmp(word, "hand")) { /* the number PID and FD over SOCKET, as a task of CRIU's */
        do_hand(sequence, (int)n[0], (int32_t)n[1], (int)n[2]);
    } else if (!strcmp(word, "fork")) {
        do_fork(sequence);
    } else if (!strcmp(word, "exec")) {
        do_exec(sequence);
    } else {
        reply(sequence, "unknown command %s", word);
    }
}

static void *work(void *argument)
{
    char command[COMMAND_BYTES];
    self = argument;
    answer = self->answer;
    __atomic_store_n(&self->tid, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
    for (;;) {
        ssize_t length = read(self->commands[0], command, sizeof(command));
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            return NULL;
        char *rest;
        uint64_t sequence = strtoull(command, &rest, 0);
        perform(sequence, rest);
    }
}

/* What the control thread does itself: what must work while every worker sleeps in a fault. */
static void oversee(uint64_t sequence, char *command)
{
    char *rest, *word = strtok_r(command, " ", &rest), *token;
    uint64_t n[3] = {0};
    for (int i = 0; i < 3 && (token = strtok_r(NULL, " ", &rest)); i++)
        n[i] = strtoull(token, NULL, 0);
    if (!strcmp(word, "exit")) {
        _exit((int)n[0]);
    } else if (!strcmp(word, "stop")) {
        stop = (int)n[0];
        reply(sequence, "value 0");
    } else if (!strcmp(word, "signal")) {
        reply(sequence, "value %d", -pthread_kill(workers[n[0]].thread, (int)n[1]));
    } else if (!strcmp(word, "signals")) {
        reply(sequence, "value %llu", (unsigned long long)workers[n[0]].signals);
    } else if (!strcmp(word, "shadow")) { /* the lockers' expectation: VALUE for COUNT pages */
        for (uint64_t i = 0; i < n[1] && i < MAX_SHADOW; i++)
            shadow[i] = n[0];
        reply(sequence, "value 0");
    } else if (!strcmp(word, "shadowed")) {
        reply(sequence, "value %llu", (unsigned long long)shadow[n[0]]);
    } else {
        reply(sequence, "unknown command %s", word);
    }
}

static void serve(uint64_t sequence)
{
    char command[COMMAND_BYTES];
    size_t length = 0;
    for (int i = 0; i < worker_count; i++) {
        workers[i].tid = 0;
        workers[i].guarded = 0;
        workers[i].signals = 0;
        if (pipe2(workers[i].commands, O_CLOEXEC) < 0)
            die("pipe2");
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die("pthread_create");
    }
    length = snprintf(control_answer, ANSWER_BYTES, "%llu ready %d",
                      (unsigned long long)sequence, (int)getpid());
    for (int i = 0; i < worker_count; i++) {
        while (!__atomic_load_n(&workers[i].tid, __ATOMIC_ACQUIRE))
            sched_yield();
        length += snprintf(control_answer + length, ANSWER_BYTES - length, " %d",
                           (int)workers[i].tid);
    }
    send_answer(control_answer, length, -1);
    for (;;) {
        ssize_t got = recv(control, command, sizeof(command) - 1, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            _exit(0);
        command[got] = 0;
        char *rest, *after;
        uint64_t number = strtoull(command, &rest, 0);
        long thread = strtol(rest, &after, 0);
        if (thread < 0) {
            oversee(number, after);
            continue;
        }
        char passed[COMMAND_BYTES];
        memset(passed, 0, sizeof(passed));
        snprintf(passed, sizeof(passed), "%llu%.*s", (unsigned long long)number,
                 COMMAND_BYTES - 32, after);
        if (thread >= worker_count || write(workers[thread].commands[1], passed, sizeof(passed)) < 0)
            reply(number, "unknown thread %ld", thread);
    }
}

int main(int count, char **arguments)
{
    if (count < 3) {
        fprintf(stderr, "usage: target CONTROL_FD THREADS [SEQUENCE]\n");
        return 64;
    }
    control = atoi(arguments[1]);
    worker_count = atoi(arguments[2]);
    if (worker_count < 1 || worker_count > MAX_THREADS) {
        fprintf(stderr, "target: 1 to %d threads\n", MAX_THREADS);
        return 64;
    }
    fcntl(control, F_SETFD, FD_CLOEXEC);
    install_handlers();
    serve(count > 3 ? strtoull(arguments[3], NULL, 0) : 0);
}
