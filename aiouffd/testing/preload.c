/* Tells a test's harness of each mapping that a child program makes of the test's memory.
 *
 * Knows: which files are the regions of the harness, and how to reach its helper process.
 * Must not know: what the memory is for; Python.
 *
 * A userfaultfd sees the faults of the process that has opened it, so the child has to open
 * its own.  This library is loaded into the child by LD_PRELOAD and stands before mmap: a
 * shared mapping of a region is registered and handed over before the program has its address.
 *
 * Laws of this file:
 *   - A program that maps no region runs as if this were not here: no descriptor stays open, no
 *     signal handler, thread or memory is added, errno is kept.
 *   - Nothing of a region is touched before the helper has taken over: no touch is missed.
 *   - What cannot be watched is not mapped: a page that nobody watches would read as zeros.
 *   - Only system calls and the stack: malloc maps memory too, and a thread that is cancelled
 *     must not end in here.
 */
#undef _FILE_OFFSET_BITS /* it makes two names one, and we define both */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFDIO_REGISTER_MODE_MINOR
#define UFFDIO_REGISTER_MODE_MINOR ((uint64_t)1 << 2)
#endif
#define EXACT_ADDRESS ((uint64_t)1 << 11)      /* UFFD_FEATURE_EXACT_ADDRESS, Linux 5.18 */
#define WP_HUGETLBFS_SHMEM ((uint64_t)1 << 12) /* UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19 */

/* A system call, again when a signal has broken it off. */
#define AGAIN(call)                                 \
  ({                                                \
    long result_;                                   \
    do result_ = (call);                            \
    while (result_ < 0 && errno == EINTR);          \
    result_;                                        \
  })

enum { MOST_REGIONS = 64, PATIENCE_SECONDS = 20 };
enum { LOADED = 1, MAPPED = 2, REFUSED = 3 };

/* One message; its twin is announcements.py. */
struct announcement {
  unsigned char key[16];
  uint32_t what;
  uint32_t region;
  uint64_t address;
  uint64_t length;
  uint64_t offset;
  uint32_t error;
  char reason[60];
};
_Static_assert(sizeof(struct announcement) == 112, "as announcements.py has it");

struct region {
  uint64_t device, inode;
  uint32_t number;
  uint64_t page_size;
};

/* From AIOUFFD_HARNESS: "SOCKET KEY HELPER USER_MODE_ONLY DEVICE:INODE:NUMBER:PAGE_SIZE ...". */
static struct region regions[MOST_REGIONS];
static int region_count;
static struct sockaddr_un helper;
static socklen_t helper_length;
static unsigned char key[16];
static int user_mode_only;

static uint64_t number_at(const char **text) {
  char *end;
  uint64_t value = strtoull(*text, &end, 10);
  *text = *end ? end + 1 : end;
  return value;
}

static unsigned digit(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

static void read_environment(void) {
  static int done;
  if (done) return;
  const char *text = getenv("AIOUFFD_HARNESS");
  if (!text) return; /* or too early in the program's start: asked again at the next mapping */
  done = 1;
  size_t length = strcspn(text, " ");
  if (length + 1 > sizeof helper.sun_path) return;
  helper.sun_family = AF_UNIX;
  memcpy(helper.sun_path + 1, text, length); /* after a zero: a name without a file */
  helper_length = offsetof(struct sockaddr_un, sun_path) + 1 + length;
  text += length;
  if (strlen(text) < 34) return;
  for (int i = 0; i < 16; i++) key[i] = digit(text[1 + 2 * i]) << 4 | digit(text[2 + 2 * i]);
  text += 34;
  pid_t tracer = number_at(&text);
  user_mode_only = number_at(&text);
  while (*text && region_count < MOST_REGIONS) {
    struct region *region = &regions[region_count++];
    region->device = number_at(&text);
    region->inode = number_at(&text);
    region->number = number_at(&text);
    region->page_size = number_at(&text);
  }
  /* Where Yama restricts ptrace, the helper may step over accesses of this process only so. */
  syscall(SYS_prctl, PR_SET_PTRACER, (long)tracer, 0, 0, 0);
}

/* Tells the helper something and waits for its answer: 0 or an errno. */
static int announce(struct announcement *message, int uffd) {
  int sock = syscall(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (sock < 0) return errno;
  struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
  syscall(SYS_setsockopt, sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  syscall(SYS_setsockopt, sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  memcpy(message->key, key, sizeof key);
  struct iovec bytes = {message, sizeof *message};
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
  } control = {0};
  struct msghdr whole = {.msg_iov = &bytes, .msg_iovlen = 1};
  if (uffd >= 0) {
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(&control.header), &uffd, sizeof uffd);
    whole.msg_control = &control;
    whole.msg_controllen = sizeof control;
  }
  uint32_t answer = 0;
  long done = AGAIN(syscall(SYS_connect, sock, &helper, helper_length));
  if (done == 0) done = AGAIN(syscall(SYS_sendmsg, sock, &whole, MSG_NOSIGNAL));
  if (done > 0) done = AGAIN(syscall(SYS_recvfrom, sock, &answer, sizeof answer, 0, 0, 0));
  int error;
  if (done < 0)
    error = errno;
  else
    error = done == sizeof answer ? (int)answer : ECONNRESET; /* the helper has ended */
  syscall(SYS_close, sock);
  return error;
}

/* A userfaultfd for this process; whether children that it forks are watched too. */
static int open_userfaultfd(int *forks) {
  const int flags = O_CLOEXEC | O_NONBLOCK;
  int uffd = -1;
  *forks = 0;
  if (!user_mode_only) {
    int device = syscall(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (device >= 0) {
      uffd = syscall(SYS_ioctl, device, USERFAULTFD_IOC_NEW, flags);
      syscall(SYS_close, device);
    }
    if (uffd < 0) uffd = syscall(SYS_userfaultfd, flags);
  }
  if (uffd < 0) uffd = syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
  if (uffd < 0) return -1;
  const uint64_t features = UFFD_FEATURE_THREAD_ID | EXACT_ADDRESS | WP_HUGETLBFS_SHMEM |
                            UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP;
  struct uffdio_api api = {.api = UFFD_API, .features = features | UFFD_FEATURE_EVENT_FORK};
  if (syscall(SYS_ioctl, uffd, UFFDIO_API, &api) == 0) {
    *forks = 1;
    return uffd;
  }
  api = (struct uffdio_api){.api = UFFD_API, .features = features};
  if (syscall(SYS_ioctl, uffd, UFFDIO_API, &api) == 0) return uffd;
  int error = errno;
  syscall(SYS_close, uffd);
  errno = error;
  return -1;
}

/* Has the helper watch a mapping: 0 or an errno, and then what could not be done. */
static int watch(const struct region *region, void *at, size_t length, off_t offset,
                 const char **what) {
  int forks;
  int uffd = open_userfaultfd(&forks);
  *what = "a userfaultfd could not be opened";
  if (uffd < 0) return errno;
  length = (length + region->page_size - 1) & ~(region->page_size - 1);
  struct uffdio_register range = {
      .range = {(uintptr_t)at, length},
      .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR};
  int error = 0;
  *what = "the mapping could not be registered";
  if (syscall(SYS_ioctl, uffd, UFFDIO_REGISTER, &range)) error = errno;
  /* A child that nobody watches would find zeros where nobody has touched yet. */
  if (!error && !forks && syscall(SYS_madvise, at, length, MADV_DONTFORK)) error = errno;
  if (!error) {
    struct announcement message = {.what = MAPPED,
                                   .region = region->number,
                                   .address = (uintptr_t)at,
                                   .length = length,
                                   .offset = offset};
    *what = "the harness does not answer";
    error = announce(&message, uffd);
  }
  syscall(SYS_close, uffd);
  return error;
}

/* Says why a mapping is not made, to the harness and to who reads the program's output. */
static void *refuse(const struct region *region, int error, const char *what) {
  struct announcement message = {.what = REFUSED, .region = region->number, .error = error};
  strncpy(message.reason, what, sizeof message.reason - 1);
  struct iovec text[] = {{"aiouffd: a region was not mapped: ", 34},
                         {(char *)what, strlen(what)},
                         {"\n", 1}};
  if (announce(&message, -1)) syscall(SYS_writev, 2, text, 3);
  errno = error;
  return MAP_FAILED;
}

static const struct region *region_of(int fd) {
  struct stat status;
  read_environment();
  if (!region_count || fstat(fd, &status)) return 0;
  for (int i = 0; i < region_count; i++)
    if (regions[i].inode == status.st_ino && regions[i].device == status.st_dev)
      return &regions[i];
  return 0;
}

static void *map(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
  int before = errno;
  const struct region *region = flags & MAP_ANONYMOUS || fd < 0 ? 0 : region_of(fd);
  errno = before;
  if (!region) return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
  if ((flags & MAP_TYPE) == MAP_PRIVATE)
    return refuse(region, ENOTSUP, "MAP_PRIVATE: only MAP_SHARED can be watched");
  /* Nobody can get at it yet: neither another thread that knows the address, nor the kernel
   * itself for MAP_POPULATE or mlockall. */
  void *mapped = (void *)syscall(SYS_mmap, at, length, PROT_NONE, flags, fd, offset);
  if (mapped == MAP_FAILED) return MAP_FAILED;
  const char *what;
  int error = watch(region, mapped, length, offset, &what);
  if (!error && syscall(SYS_mprotect, mapped, length, protection)) {
    error = errno;
    what = "its protection could not be set";
  }
  if (error) {
    syscall(SYS_munmap, mapped, length);
    return refuse(region, error, what);
  }
  errno = before;
  return mapped;
}

__attribute__((visibility("default"))) void *mmap(void *at, size_t length, int protection,
                                                   int flags, int fd, off_t offset) {
  return map(at, length, protection, flags, fd, offset);
}

__attribute__((visibility("default"))) void *mmap64(void *at, size_t length, int protection,
                                                     int flags, int fd, off_t offset) {
  return map(at, length, protection, flags, fd, offset);
}

__attribute__((constructor)) static void begin(void) {
  int before = errno;
  read_environment();
  struct announcement message = {.what = LOADED};
  if (helper_length) announce(&message, -1); /* a harness that has ended has no use for it */
  errno = before;
}
