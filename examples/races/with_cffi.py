"""The parser of double_fetch.py, called through cffi instead of ctypes.

    python examples/races/with_cffi.py

Its second look at the length is frozen, and the length changed while it stands there.
"""

from cffi import FFI

from aiouffd.testing import Harness
from compiled import library

ffi = FFI()
ffi.cdef("""
    struct packet { uint8_t kind; uint8_t length; uint8_t payload[255]; };
    struct message { uint8_t kind; uint8_t length; uint8_t payload[64]; uint8_t guard[191]; };
    int parse(struct packet *packet, struct message *message);
    int parse_repaired(struct packet *packet, struct message *message);
""")
c = ffi.dlopen(library("parser.c", "luck.c")._name)


def length_of(parser: str) -> int:
    """Give the length that the parser believes, of a packet whose length grows meanwhile."""
    with Harness() as uffd:
        region = uffd.region(1, contents=bytes([1, 16]), name="packet")
        packet = ffi.cast("struct packet *", region.address)
        message = ffi.new("struct message *")
        length = region.at(ffi.offsetof("struct packet", "length"), name="length")
        with length.freeze(nth=2) as freeze:
            running = uffd.start_named("parser", getattr(c, parser), packet, message)
            while not running.done and not freeze.frozen:
                running.thread.join(0.001)
            for frozen in freeze.frozen:  # nobody, if it looks but once
                length.poke(bytes([255]))
                frozen.release()
            running.result()
        return int(message.length)


for parser in ("parse", "parse_repaired"):
    print(f"{parser}: payload of 64 bytes, length {length_of(parser)}")
