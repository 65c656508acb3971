/* A parser of packets in memory that somebody else can write.

   The sender's memory is mapped here too, as it is between a driver and its device, or between
   two processes with a ring of packets.  parse() looks at the length, and then uses it.  Between
   the two the sender may write another one. */

#include <stdint.h>
#include <string.h>

enum { PAYLOAD = 64, LONGEST = 255, GUARD = LONGEST - PAYLOAD };

struct packet {
    uint8_t kind;
    uint8_t length; /* of the payload, in bytes */
    uint8_t payload[LONGEST];
};

/* Where packets go.  What does not fit runs into the guard, so that it can be seen and does no
   harm: a length is one byte, so nothing reaches past it. */
struct message {
    uint8_t kind;
    uint8_t length;
    uint8_t payload[PAYLOAD];
    uint8_t guard[GUARD];
};

enum result { PARSED = 0, UNKNOWN_KIND = 1, TOO_LONG = 2 };

/* The packet is volatile because it changes behind the compiler's back.  That is right, and it
   is no protection: each look at the length is a look at the memory. */
int parse(const volatile struct packet *packet, struct message *message)
{
    if (packet->kind > 3)
        return UNKNOWN_KIND;
    if (packet->length > sizeof message->payload)
        return TOO_LONG; /* checked here ... */
    message->kind = packet->kind;
    message->length = packet->length; /* ... and fetched again here */
    memcpy(message->payload, (const uint8_t *)packet->payload, message->length);
    return PARSED;
}

/* The repair: fetch once, check what was fetched, use what was checked. */
int parse_repaired(const volatile struct packet *packet, struct message *message)
{
    uint8_t kind = packet->kind;
    uint8_t length = packet->length;

    if (kind > 3)
        return UNKNOWN_KIND;
    if (length > sizeof message->payload)
        return TOO_LONG;
    message->kind = kind;
    message->length = length;
    memcpy(message->payload, (const uint8_t *)packet->payload, length);
    return PARSED;
}
