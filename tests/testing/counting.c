/* Threads that count together, well and badly, for tests of orders. */
#include <pthread.h>

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

/* Two locks, one way round and the other; the touch between them is where another may come. */
void first_second(volatile long *count) {
  pthread_mutex_lock(&first);
  *count = 1;
  pthread_mutex_lock(&second);
  pthread_mutex_unlock(&second);
  pthread_mutex_unlock(&first);
}

void second_first(volatile long *count) {
  pthread_mutex_lock(&second);
  *count = 2;
  pthread_mutex_lock(&first);
  pthread_mutex_unlock(&first);
  pthread_mutex_unlock(&second);
}

/* Ends a deadlock of the two, which glibc lets any thread do. */
void unlock_both(void) {
  pthread_mutex_unlock(&first);
  pthread_mutex_unlock(&second);
}

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
