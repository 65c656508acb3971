/* Threads that count together, well and badly, for tests of orders. */
#define _GNU_SOURCE
#include <pthread.h>
#include <time.h>

static pthread_mutex_t first = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t second = PTHREAD_MUTEX_INITIALIZER;

/* Loads, and stores: an addition in between is lost. */
void add(volatile long *count) {
  long value = *count;
  *count = value + 1;
}

void add_locked(volatile long *count) {
  pthread_mutex_lock(&first);
  add(count);
  pthread_mutex_unlock(&first);
}

void add_atomic(long *count) { __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST); }

static volatile int given_up;

/* Ends deadlocks while it is 1, within a second. */
void give_up(int now) { given_up = now; }

/* Gives 0 if it was given up. */
static int lock(pthread_mutex_t *mutex) {
  for (;;) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    if (pthread_mutex_timedlock(mutex, &until) == 0) return 1;
    if (given_up) return 0;
  }
}

/* The touch between the two locks is where another may come. */
static void both(pthread_mutex_t *one, pthread_mutex_t *other, volatile long *count) {
  if (!lock(one)) return;
  *count = 1;
  if (lock(other)) pthread_mutex_unlock(other);
  pthread_mutex_unlock(one);
}

void first_second(volatile long *count) { both(&first, &second, count); }
void second_first(volatile long *count) { both(&second, &first, count); }

/* Polls until somebody sets it. */
void wait_for(volatile long *flag) {
  while (!*flag) continue;
}

void set(volatile long *flag) { *flag = 1; }

/* Does what a text says: r0 reads the first number, w1 writes the second, l and u lock and unlock.
   A write puts down what was read last, plus one. */
void follow(const char *text, volatile long *numbers) {
  long last = 0;
  for (; *text; text++) {
    if (*text == 'r') last = numbers[*++text - '0'];
    if (*text == 'w') numbers[*++text - '0'] = last + 1;
    if (*text == 'l') pthread_mutex_lock(&first);
    if (*text == 'u') pthread_mutex_unlock(&first);
  }
}
