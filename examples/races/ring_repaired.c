/* The ring of ring.c, repaired: any number of threads may push and pop.

   A push claims its slot by moving the head on in one step, which fails if another thread was
   faster, and writes the value after that.  Whose turn it is stands in the slot itself, so that
   nobody reads a value that is not written yet.  With the head or tail of a round's first slot as
   the round's name: turn == round, and the push may write; turn == round + 1, and the pop may
   read.  Memory full of zeros is an empty ring. */

#include <stdatomic.h>
#include <stdint.h>

enum { SLOTS = 4 }; /* a power of two, so that the counts may run over */

struct slot {
    _Atomic uint32_t turn;
    uint32_t value;
};

struct ring {
    _Atomic uint32_t head;
    _Atomic uint32_t tail;
    struct slot slots[SLOTS];
};

/* Claim the next slot whose turn is `after` its round; 0 if there is none.

   Relaxed loads of the counts are enough: a stale one makes the claim fail, and it is the turn
   that hands the value over. */
static struct slot *claim(struct ring *ring, _Atomic uint32_t *count, uint32_t after)
{
    uint32_t at = atomic_load_explicit(count, memory_order_relaxed);

    for (;;) {
        struct slot *slot = &ring->slots[at % SLOTS];
        uint32_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);
        uint32_t before = at;

        if (turn == at - at % SLOTS + after) {
            if (atomic_compare_exchange_strong(count, &at, at + 1))
                return slot;
        } else {
            at = atomic_load_explicit(count, memory_order_relaxed);
            if (at == before)
                return 0;
        }
    }
}

/* Give 1, or 0 if the ring is full. */
int ring_push(struct ring *ring, uint32_t value)
{
    struct slot *slot = claim(ring, &ring->head, 0);

    if (!slot)
        return 0;
    slot->value = value;
    atomic_fetch_add_explicit(&slot->turn, 1, memory_order_release);
    return 1;
}

/* Give 1, or 0 if nothing is there, or the oldest value is not written to its end. */
int ring_pop(struct ring *ring, uint32_t *value)
{
    struct slot *slot = claim(ring, &ring->tail, 1);

    if (!slot)
        return 0;
    *value = slot->value;
    atomic_fetch_add_explicit(&slot->turn, SLOTS - 1, memory_order_release);
    return 1;
}
