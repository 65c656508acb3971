/* Prints the record that lies in shared memory: its length on the first page, its text on the
 * next.  Whoever writes a record makes the version odd before and even again after it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct header {
  volatile unsigned version;
  volatile unsigned length;
};

int main(int count, char **arguments) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const int careful = count > 1 && !strcmp(arguments[1], "careful");
  const int fd = atoi(getenv("AIOUFFD_REGION"));
  const char *memory = mmap(0, 2 * page, PROT_READ, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return perror("mmap"), 1;
  const struct header *header = (const struct header *)memory;
  char text[100];
  unsigned before, length;
  do {
    before = header->version;
    length = header->length;
    if (length > sizeof text) return 2;
    memcpy(text, memory + page, length);
  } while (careful && (before % 2 || before != header->version));
  printf("%.*s\n", (int)length, text);
  return 0;
}
