/* Open files for a guest, below one folder only.

   The guest hands a path over in memory that it shares with us.  We check the path, and then the
   kernel reads it again: what was opened is what stood there then. */

#include <errno.h>
#include <fcntl.h>
#include <string.h>

static int is_allowed(const char *folder, const char *path)
{
    size_t length = strlen(folder);

    return strncmp(path, folder, length) == 0 && path[length] == '/' && !strstr(path, "..");
}

/* Give a descriptor, or -1 with errno; EACCES: a path that is not below the folder. */
int sandbox_open(const char *folder, const char *path)
{
    if (!is_allowed(folder, path)) {
        errno = EACCES;
        return -1;
    }
    return open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}

/* The repair: copy the path, check the copy, open the copy. */
int sandbox_open_repaired(const char *folder, const char *path)
{
    char copy[256];

    /* A byte at a time up to the end, since the guest may move the end too. */
    for (size_t i = 0;; i++) {
        if (i == sizeof copy) {
            errno = ENAMETOOLONG;
            return -1;
        }
        copy[i] = ((const volatile char *)path)[i];
        if (copy[i] == '\0')
            break;
    }
    if (!is_allowed(folder, copy)) {
        errno = EACCES;
        return -1;
    }
    return open(copy, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}
