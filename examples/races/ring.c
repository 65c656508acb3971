/* A ring of records into which several threads push, and from which one thread pops.

   It looks right, and it is for one thread: each push takes the slot at the head, writes it and
   moves the head on. */

#include <stdint.h>

enum { SLOTS = 4 };

struct ring {
    uint32_t head; /* of the next push; counts on without end */
    uint32_t tail; /* of the next pop */
    uint32_t values[SLOTS];
};

/* Give 1, or 0 if the ring is full. */
int ring_push(struct ring *ring, uint32_t value)
{
    uint32_t at = ring->head;

    if (at - ring->tail == SLOTS)
        return 0;
    ring->values[at % SLOTS] = value; /* another thread may have taken this slot too */
    ring->head = at + 1;
    return 1;
}

/* Give 1, or 0 if the ring is empty. */
int ring_pop(struct ring *ring, uint32_t *value)
{
    uint32_t at = ring->tail;

    if (at == ring->head)
        return 0;
    *value = ring->values[at % SLOTS];
    ring->tail = at + 1;
    return 1;
}
