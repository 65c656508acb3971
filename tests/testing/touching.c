/* What threads do to memory, one access at a time, for tests of the harness. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* One load, one store. */
int load(const volatile unsigned char *at) { return *at; }
void store(volatile unsigned char *at, unsigned char value) { *at = value; }

/* Loads of one byte each, `count` times from the same place; their sum. */
int load_again(const volatile unsigned char *at, int count) {
  int sum = 0;
  for (int i = 0; i < count; i++) sum += *at;
  return sum;
}

/* The first load in the high byte of the answer, the second in the low one. */
int load_twice(const volatile unsigned char *at) {
  int first = *at;
  int second = *at;
  return first << 8 | second;
}

/* A counter that is not atomic: load, then store. */
void increment(volatile unsigned char *at, int times) {
  for (int i = 0; i < times; i++) {
    unsigned char value = *at;
    *at = value + 1;
  }
}

/* Loads one byte of each page, first to last. */
int walk(const volatile unsigned char *at, int pages, int page_size) {
  int sum = 0;
  for (int i = 0; i < pages; i++) sum += at[(long)i * page_size];
  return sum;
}

/* Eight bytes in one load, wherever they lie. */
unsigned long load8(const void *at) {
  unsigned long value;
  memcpy(&value, at, sizeof value);
  return value;
}

/* write(2): bytes written, or -errno. */
long write_out(int fd, const void *from, unsigned long length) {
  long done = write(fd, from, length);
  return done < 0 ? -errno : done;
}

long read_in(int fd, void *to, unsigned long length) {
  long done = read(fd, to, length);
  return done < 0 ? -errno : done;
}

/* SIGBUS, taken and answered by trying again: how often it came until the load went well. */
static volatile sig_atomic_t buses;
static void count_bus(int number) {
  (void)number;
  buses++;
  if (buses > 100) _exit(3);
}
int load_until_whole(const volatile unsigned char *at, unsigned char *value) {
  struct sigaction action = {.sa_handler = count_bus}, before;
  buses = 0;
  sigaction(SIGBUS, &action, &before);
  *value = *at;
  sigaction(SIGBUS, &before, 0);
  return buses;
}

/* Forks; the child loads, the parent gives the byte that it found. */
int load_forked(const volatile unsigned char *at) {
  pid_t child = fork();
  if (child == 0) _exit(*at);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* One instruction that touches two places, if the compiler finds it; else two. */
void copy(void *to, const void *from) {
#ifdef __x86_64__
  __asm__ volatile("movsb" : "+D"(to), "+S"(from) : : "memory");
#else
  *(volatile unsigned char *)to = *(const volatile unsigned char *)from;
#endif
}

/* A storm of SIGALRM at this thread while it counts in memory: how many alarms were taken. */
static volatile sig_atomic_t alarms;
static __thread int is_alarmed;
static void count_alarm(int number) {
  (void)number;
  if (is_alarmed) alarms++;
}
long alarmed(void *at, int times, int signals) {
  struct sigaction action = {.sa_handler = count_alarm}, before;
  sigset_t one, old;
  is_alarmed = 1;
  alarms = 0;
  sigaction(SIGRTMIN + 3, &action, &before);
  volatile unsigned char *byte = at;
  int sent = 0;
  for (int i = 0; i < times; i++) {
    /* Blocked until just before the access: then all of them come with it. */
    sigemptyset(&one);
    sigaddset(&one, SIGRTMIN + 3);
    pthread_sigmask(SIG_BLOCK, &one, &old);
    for (int j = 0; j < signals; j++) sent += pthread_kill(pthread_self(), SIGRTMIN + 3) == 0;
    pthread_sigmask(SIG_SETMASK, &old, 0);
    *byte = *byte + 1;
  }
  sigaction(SIGRTMIN + 3, &before, 0);
  is_alarmed = 0;
  return alarms == sent ? alarms : -alarms - 1;
}

/* poll(2) with its array in memory, until `fd` is readable: the events, or -errno. */
long wait_poll(int fd, void *at, void *unused) {
  (void)unused;
  struct pollfd *fds = at;
  fds->fd = fd;
  fds->events = POLLIN;
  fds->revents = 0;
  long found = poll(fds, 1, -1);
  return found < 0 ? -errno : fds->revents;
}

/* recvmsg(2) with its vector at `at` and its buffer at `into`: bytes, or -errno. */
long wait_message(int fd, void *at, void *into) {
  struct iovec *vector = at;
  vector->iov_base = into;
  vector->iov_len = 8;
  struct msghdr header = {.msg_iov = vector, .msg_iovlen = 1};
  long done = recvmsg(fd, &header, 0);
  return done < 0 ? -errno : done;
}

/* epoll_pwait(2) with its signal mask at `at`, which it reads before it sleeps. */
long wait_epoll(int fd, void *at, void *unused) {
  (void)unused;
  struct epoll_event event = {.events = EPOLLIN};
  int epoll = epoll_create1(0);
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  sigemptyset(at);
  long found = epoll_pwait(epoll, &event, 1, -1, at);
  found = found < 0 ? -errno : found;
  close(epoll);
  return found;
}

/* A store (a load if `value` is negative) that is given up if it gets SIGBUS: whether it did. */
static __thread sigjmp_buf way_out;
static pthread_mutex_t giving_up = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before_all;
static int in_fails;
static void give_up(int number) {
  (void)number;
  siglongjmp(way_out, 1);
}
static void count_in(int change) {
  struct sigaction action = {.sa_handler = give_up};
  pthread_mutex_lock(&giving_up);
  if (in_fails == 0) sigaction(SIGBUS, &action, &before_all);
  in_fails += change;
  if (in_fails == 0) sigaction(SIGBUS, &before_all, 0);
  pthread_mutex_unlock(&giving_up);
}
int fails(volatile unsigned char *at, int value) {
  volatile int failed = 1;
  count_in(1);
  if (sigsetjmp(way_out, 1) == 0) {
    if (value < 0)
      (void)*at;
    else
      *at = value;
    failed = 0;
  }
  count_in(-1);
  return failed;
}

/* futex(2) on a word that has another value than it waits for: -EAGAIN, at once.  The kernel pins
   the word's page for it. */
long futex_mismatch(const unsigned int *at) {
  long done = syscall(SYS_futex, at, 0 /* FUTEX_WAIT */, 0xdeadbeef, 0, 0, 0);
  return done < 0 ? -errno : done;
}

/* Counts in memory while a timer interrupts this thread every 200 microseconds: alarms taken. */
static volatile sig_atomic_t storms;
static void count_storm(int number) {
  (void)number;
  storms++;
}
long in_a_storm(volatile unsigned char *at, int times) {
  struct sigaction action = {.sa_handler = count_storm, .sa_flags = SA_RESTART}, before;
  struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 4};
  event._sigev_un._tid = (int)syscall(SYS_gettid);
  struct itimerspec every = {{0, 200000}, {0, 200000}};
  timer_t timer;
  storms = 0;
  sigaction(SIGRTMIN + 4, &action, &before);
  timer_create(CLOCK_MONOTONIC, &event, &timer);
  timer_settime(timer, 0, &every, 0);
  for (int i = 0; i < times; i++) *at = *at + 1;
  while (storms == 0) continue;
  timer_delete(timer);
  sigaction(SIGRTMIN + 4, &before, 0);
  return storms;
}

/* poll(2) as above, which a handler of SIGRTMIN + 3 interrupts. */
long interrupted(int fd, void *at) {
  struct sigaction action = {.sa_handler = count_alarm}, before;
  sigaction(SIGRTMIN + 3, &action, &before);
  long found = wait_poll(fd, at, 0);
  sigaction(SIGRTMIN + 3, &before, 0);
  return found;
}

/* A load, and the load that a signal handler makes within it (SIGUSR1): first in the high byte. */
static const volatile unsigned char *volatile within;
static volatile sig_atomic_t found_within;
static void load_within(int number) {
  (void)number;
  found_within = *within;
}
int load_interrupted(const volatile unsigned char *at, const volatile unsigned char *inner) {
  struct sigaction action = {.sa_handler = load_within}, before;
  within = inner;
  found_within = 0;
  sigaction(SIGUSR1, &action, &before);
  int value = *at;
  sigaction(SIGUSR1, &before, 0);
  return value << 8 | found_within;
}
