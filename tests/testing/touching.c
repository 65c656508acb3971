/* What threads do to memory, one access at a time, for tests of the harness. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
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
