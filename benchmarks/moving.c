/*
 * What guest.py's guest does, as threads of a program: it rewrites some memory, and reads all of it.
 *
 * Knows: memory, and the numbers where it goes on; one word that says whether it may.
 * Must not know: who stops it, or why; it is called without the GIL.
 *
 * Each page holds its own offset, at 8 and at 4088; its first eight bytes count how often it was
 * written.  The first pages (the window) are written over and over, one a step, and the count is
 * checked; in the same step one page of all memory is read, in scattered order, and its offsets are.
 */
#include <stdint.h>
#include <stdatomic.h>
#include <time.h>

#define PAGE 4096

struct worker {
	/* The state: what goes along. */
	uint64_t count;		/* of this turn; from 1 on */
	uint64_t written;	/* the page of the window that is next */
	uint64_t read;		/* the page of all memory that is next */
	uint64_t rounds;	/* of reading */
	/* The orders. */
	_Atomic uint64_t may_run;
	_Atomic uint64_t stands_still;
	_Atomic uint64_t wrong;	/* 1 + the page where a check failed */
};

static inline volatile uint64_t *word(char *memory, uint64_t page, unsigned at)
{
	return (volatile uint64_t *)(memory + page * PAGE + at);
}

void fill(char *memory, uint64_t pages)
{
	uint64_t noise = 88172645463325252ull;

	for (uint64_t page = 0; page < pages; page++) {
		/* Not to be compressed, and no zeros. */
		for (unsigned at = 16; at < PAGE - 8; at += 8) {
			noise ^= noise << 13;
			noise ^= noise >> 7;
			noise ^= noise << 17;
			*word(memory, page, at) = noise;
		}
		*word(memory, page, 0) = 0;
		*word(memory, page, 8) = page * PAGE + 1;
		*word(memory, page, PAGE - 8) = page * PAGE + 1;
	}
}

/* Until a check fails. */
void work(struct worker *worker, char *memory, uint64_t pages, uint64_t window, uint64_t stride)
{
	const struct timespec moment = { 0, 50000 };

	for (;;) {
		while (!atomic_load_explicit(&worker->may_run, memory_order_acquire)) {
			atomic_store(&worker->stands_still, 1);
			nanosleep(&moment, 0);
		}
		if (window) {
			uint64_t page = worker->written;

			*word(memory, page, 0) += 1;
			if (*word(memory, page, 0) != worker->count || *word(memory, page, 8) != page * PAGE + 1) {
				atomic_store(&worker->wrong, page + 1);
				return;
			}
			if (++worker->written == window) {
				worker->written = 0;
				worker->count++;
			}
		}
		uint64_t page = worker->read;

		if (*word(memory, page, 8) != page * PAGE + 1 || *word(memory, page, PAGE - 8) != page * PAGE + 1) {
			atomic_store(&worker->wrong, page + 1);
			return;
		}
		worker->read += stride;
		if (worker->read >= pages)
			worker->read -= pages;
		if (!worker->read)
			worker->rounds++;
	}
}
