/* A process whose memory a checkpoint holds: it checks every word of it when it is told to.
 *
 *     criu_pages FOLDER MIB THREADS SEED
 *
 * Fills MIB of private anonymous memory, writes the address to FOLDER/ready and waits for
 * FOLDER/go, which says "MODE SEED SHARE THREADS": how the threads touch the pages (sequential,
 * random, or writing: random, each page changed and checked again), the seed of the order, which
 * share of the pages they touch at all, and how many threads do (all, if that is left out).
 * FOLDER/result then holds JSON: whether every word of them was right, the first wrong ones with
 * their addresses, and how long the touches took.
 * It leaves no file open, so that one checkpoint can be restored anywhere, any number of times.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(uint64_t))
#define SHOWN 8 /* wrong words that are described */

static const char *folder;
static char *memory;
static uint64_t content_seed;
static size_t pages, touched;
static int threads, working, writing;
static uint32_t *order; /* which page comes when; fresh memory, made after the restore */
static uint32_t *took;  /* nanoseconds of each touch, in the same order */
static pthread_barrier_t begin, end;

static struct {
	pthread_mutex_t lock;
	size_t count;
	struct wrong {
		char *address;
		uint64_t want, got;
	} first[SHOWN];
} wrong = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void fail(const char *what)
{
	fprintf(stderr, "criu_pages: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t x) /* splitmix64: every bit depends on every bit */
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static uint64_t first_word(size_t page, uint64_t generation)
{
	return mix(content_seed ^ mix(page + (generation << 40)));
}

static void fill(size_t page, uint64_t generation)
{
	uint64_t *words = (uint64_t *)(memory + page * PAGE), value = first_word(page, generation);
	for (size_t i = 0; i < WORDS; i++, value += 0x9e3779b97f4a7c15)
		words[i] = value;
}

static void check(size_t page, uint64_t generation)
{
	uint64_t *words = (uint64_t *)(memory + page * PAGE), value = first_word(page, generation);
	uint64_t differs = 0;
	for (size_t i = 0; i < WORDS; i++)
		differs |= words[i] ^ (value + i * 0x9e3779b97f4a7c15);
	if (!differs)
		return;
	pthread_mutex_lock(&wrong.lock);
	for (size_t i = 0; i < WORDS; i++, value += 0x9e3779b97f4a7c15) {
		if (words[i] == value)
			continue;
		if (wrong.count < SHOWN)
			wrong.first[wrong.count] = (struct wrong){(char *)&words[i], value, words[i]};
		wrong.count++;
	}
	pthread_mutex_unlock(&wrong.lock);
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t now(void) /* a restored program may have a time namespace: only differences count */
{
	return clock_ns(CLOCK_MONOTONIC);
}

static void *touch(void *number)
{
	size_t thread = (size_t)number;
	pthread_barrier_wait(&begin);
	size_t last = touched * (thread + 1) / working;
	for (size_t i = touched * thread / working; thread < (size_t)working && i < last; i++) {
		char *first = memory + order[i] * PAGE;
		uint64_t start = now();
		if (writing)
			__atomic_fetch_or(first, 0, __ATOMIC_RELAXED); /* changes nothing */
		else
			(void)*(volatile char *)first;
		uint64_t ns = now() - start;
		took[i] = ns < UINT32_MAX ? ns : UINT32_MAX;
		check(order[i], 0);
		if (writing) {
			fill(order[i], 1);
			check(order[i], 1);
		}
	}
	pthread_barrier_wait(&end);
	while (pause()) /* for ever: an end would discard the stack, */
		;       /* and the stock daemon loses faults beside that */
	return NULL;
}

static void *fresh(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

static FILE *in_folder(const char *name, const char *how)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", folder, name);
	return fopen(path, how);
}

static void publish(const char *name, const char *text)
{
	char partial[4096], path[4096];
	snprintf(path, sizeof path, "%s/%s", folder, name);
	FILE *file = in_folder("partial", "w");
	if (!file || fputs(text, file) < 0 || fclose(file))
		fail(path);
	snprintf(partial, sizeof partial, "%s/partial", folder);
	if (rename(partial, path))
		fail(path);
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static void report(uint64_t took_ns)
{
	static char text[8192];
	int at = 0;
	size_t slow = 0;
	qsort(took, touched, sizeof *took, by_value);
	for (size_t i = 0; i < touched; i++)
		slow += took[i] > 2000;
	at += sprintf(text + at, "{\"pid\": %d, \"right\": %s, \"took_ns\": %llu, \"touched\": %zu, ",
		      getpid(), wrong.count ? "false" : "true", (unsigned long long)took_ns, touched);
	at += sprintf(text + at, "\"ended_ns\": %llu, ", (unsigned long long)clock_ns(CLOCK_REALTIME));
	at += sprintf(text + at, "\"waited\": %zu, \"p50_ns\": %u, \"p90_ns\": %u, ", slow,
		      took[touched / 2], took[touched * 9 / 10]);
	at += sprintf(text + at, "\"p99_ns\": %u, \"max_ns\": %u, \"wrong_words\": %zu, ",
		      took[touched * 99 / 100], took[touched - 1], wrong.count);
	at += sprintf(text + at, "\"wrong\": [");
	for (size_t i = 0; i < wrong.count && i < SHOWN; i++)
		at += sprintf(text + at, "%s\"%p: %016llx instead of %016llx\"", i ? ", " : "",
			      wrong.first[i].address, (unsigned long long)wrong.first[i].got,
			      (unsigned long long)wrong.first[i].want);
	sprintf(text + at, "]}\n");
	publish("result", text);
}

static int told_to_go(char *mode, uint64_t *seed, double *share)
{
	FILE *file = in_folder("go", "r");
	if (!file)
		return 0;
	unsigned long long number;
	working = threads;
	int found = fscanf(file, "%31s %llu %lf %d", mode, &number, share, &working);
	fclose(file);
	*seed = number;
	return found >= 3 && working >= 1 && working <= threads;
}

int main(int count, char **arguments)
{
	if (count != 5) {
		fprintf(stderr, "usage: criu_pages FOLDER MIB THREADS SEED\n");
		return 2;
	}
	folder = arguments[1];
	pages = strtoul(arguments[2], NULL, 10) * (1024 * 1024 / PAGE);
	threads = atoi(arguments[3]);
	content_seed = strtoull(arguments[4], NULL, 10);
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	for (size_t page = 0; page < pages; page++)
		fill(page, 0);
	pthread_barrier_init(&begin, NULL, threads + 1);
	pthread_barrier_init(&end, NULL, threads + 1);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;
		if ((errno = pthread_create(&thread, NULL, touch, (void *)(size_t)i)))
			fail("pthread_create");
	}
	char text[64], mode[32];
	snprintf(text, sizeof text, "%#lx\n", (unsigned long)memory);
	publish("ready", text);

	uint64_t seed;
	double share;
	while (!told_to_go(mode, &seed, &share))
		usleep(1000);
	writing = !strcmp(mode, "writing");
	order = fresh(pages * sizeof *order);
	touched = (size_t)(pages * share);
	took = fresh((touched + 1) * sizeof *took);
	for (size_t i = 0; i < pages; i++)
		order[i] = i;
	if (strcmp(mode, "sequential"))
		for (size_t i = pages - 1; i > 0; i--) {
			size_t j = (seed = mix(seed)) % (i + 1);
			uint32_t other = order[j];
			order[j] = order[i];
			order[i] = other;
		}
	uint64_t start = now();
	pthread_barrier_wait(&begin);
	pthread_barrier_wait(&end);
	report(now() - start);
	for (;;)
		pause();
}
