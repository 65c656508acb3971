/* A program that is given a memfd and does with it what its arguments say, one after the other. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile unsigned char *memory;
static size_t length;

static void *load(void *at) { return (void *)(long)memory[(long)at]; }

/* The sum of what some threads load from the same place. */
static long load_in_threads(long at, int count) {
  pthread_t threads[16];
  long sum = 0;
  for (int i = 0; i < count; i++) pthread_create(&threads[i], 0, load, (void *)at);
  for (int i = 0; i < count; i++) {
    void *value;
    pthread_join(threads[i], &value);
    sum += (long)value;
  }
  return sum;
}

/* What a forked child finds, or minus the signal that has ended it. */
static int load_forked(long at) {
  pid_t child = fork();
  if (child == 0) _exit(memory[at]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static volatile long touched_by_handler;
static void on_signal(int number) {
  (void)number;
  load((void *)touched_by_handler);
}

static volatile unsigned char *map(int fd, size_t size, int flags) {
  void *at = mmap(0, size, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (at == MAP_FAILED) {
    printf("errno %d\n", errno);
    return 0;
  }
  return at;
}

int main(int count, char **words) {
  const char *variable = getenv("AIOUFFD_REGION");
  int fd = variable ? atoi(variable) : -1;
  struct stat status;
  if (fd >= 0 && fstat(fd, &status) == 0) length = status.st_size;
  setbuf(stdout, 0);
  for (int i = 1; i < count; i++) {
    const char *word = words[i];
    if (!strcmp(word, "map")) memory = map(fd, length, MAP_SHARED);
    else if (!strcmp(word, "map-page")) memory = map(fd, getpagesize(), MAP_SHARED);
    else if (!strcmp(word, "map-filled")) memory = map(fd, length, MAP_SHARED | MAP_POPULATE);
    else if (!strcmp(word, "map-private")) memory = map(fd, length, MAP_PRIVATE);
    else if (!strcmp(word, "map-path")) {
      char path[40];
      snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
      memory = map(open(path, O_RDWR), length, MAP_SHARED);
    }
    else if (!strcmp(word, "unmap")) munmap((void *)memory, length);
    else if (!strcmp(word, "move")) {
      void *to = mmap(0, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      memory = mremap((void *)memory, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    }
    else if (!strcmp(word, "grow")) memory = mremap((void *)memory, getpagesize(), length, MREMAP_MAYMOVE);
    else if (!strcmp(word, "load")) printf("%d\n", memory[atol(words[++i])]);
    else if (!strcmp(word, "store")) memory[atol(words[++i])] = 99;
    else if (!strcmp(word, "threads")) printf("%ld\n", load_in_threads(atol(words[++i]), 3));
    else if (!strcmp(word, "behind")) { pthread_t thread; pthread_create(&thread, 0, load, (void *)atol(words[++i])); }
    else if (!strcmp(word, "handler")) { touched_by_handler = atol(words[++i]); signal(SIGUSR1, on_signal); }
    else if (!strcmp(word, "fork")) printf("%d\n", load_forked(atol(words[++i])));
    else if (!strcmp(word, "write")) printf(" %zd\n", write(1, (void *)&memory[atol(words[++i])], 1));
    else if (!strcmp(word, "close-all")) { for (int other = 3; other < 1000; other++) if (other != fd) close(other); }
    else if (!strcmp(word, "exec")) { words[i] = words[0]; execv(words[0], &words[i]); }
    else if (!strcmp(word, "wait")) { char byte; if (read(0, &byte, 1) < 0) return 2; }
    else if (!strcmp(word, "nobody")) { if (setgid(65534) || setuid(65534)) return 4; }
    else return 3;
  }
  return 0;
}
