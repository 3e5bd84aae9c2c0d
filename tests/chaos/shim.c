/* Kills the process, or fails a call, at the n-th write-side call on a path below a root.
 *
 * Preloaded into a process, it does nothing until `chaos_arm` is called. Reads are never counted: what a disk has lost is
 * another fault than what it doesn't take. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, count;  /* which call is hit: 0 for none; how many there were */
static int error_number; /* 0: kill */
static int lasting;      /* every later call is hit as well */
static int journal = -1; /* a descriptor: a line for each call */

/* Below `below`, hit call number `n`: kill where `number` is 0, else fail with that errno. Returns nothing. */
void chaos_arm(const char *below, long n, int number, int from_then_on, int journal_descriptor) {
  snprintf(root, sizeof root, "%s/", below);
  at = n, error_number = number, lasting = from_then_on, journal = journal_descriptor, count = 0;
}

long chaos_count(void) { return count; }

/* Whether the call called `what`, on `path`, is to fail; errno is then set. */
static int hit(const char *what, const char *path) {
  if (!root[0] || strncmp(path, root, strlen(root))) return 0;
  long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  int hits = at && (number == at || (lasting && number > at));
  if (error_number == ENOSPC && !strcmp(what, "unlink")) hits = 0; /* a full disk takes away what it holds */
  if (journal >= 0 && (!at || (hits && number == at))) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, what, path + strlen(root));
    syscall(SYS_write, journal, line, length);
  }
  if (hits && !error_number) syscall(SYS_kill, getpid(), SIGKILL);
  if (hits) errno = error_number;
  return hits;
}

static int hit_descriptor(const char *what, int descriptor) {
  if (!root[0]) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return hit(what, path);
}

static int hit_path(const char *what, int folder, const char *name) {
  if (!root[0] || !name) return 0;
  if (name[0] == '/') return hit(what, name);
  char path[2 * PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(path, PATH_MAX)) return 0;
  } else {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
  }
  strncat(strcat(path, "/"), name, PATH_MAX - 1);
  return hit(what, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* A function that returns -1 where `condition` holds, and what the real one returns otherwise. */
#define WRAP(type, name, parameters, arguments, condition)        \
  type name parameters {                                          \
    static __typeof__(&name) real;                                \
    if (!real) real = REAL(name);                                 \
    return (condition) ? -1 : real arguments;                     \
  }

WRAP(ssize_t, write, (int d, const void *b, size_t n), (d, b, n), hit_descriptor("write", d))
WRAP(ssize_t, pwrite, (int d, const void *b, size_t n, off_t o), (d, b, n, o), hit_descriptor("write", d))
WRAP(ssize_t, pwrite64, (int d, const void *b, size_t n, off64_t o), (d, b, n, o), hit_descriptor("write", d))
WRAP(ssize_t, writev, (int d, const struct iovec *v, int n), (d, v, n), hit_descriptor("write", d))
WRAP(ssize_t, sendfile, (int d, int s, off_t *o, size_t n), (d, s, o, n), hit_descriptor("write", d))
WRAP(ssize_t, sendfile64, (int d, int s, off64_t *o, size_t n), (d, s, o, n), hit_descriptor("write", d))
WRAP(ssize_t, copy_file_range, (int s, off64_t *a, int d, off64_t *b, size_t n, unsigned f), (s, a, d, b, n, f),
     hit_descriptor("write", d))
WRAP(int, fsync, (int d), (d), hit_descriptor("fsync", d))
WRAP(int, fdatasync, (int d), (d), hit_descriptor("fsync", d))
WRAP(int, ftruncate, (int d, off_t n), (d, n), hit_descriptor("truncate", d))
WRAP(int, ftruncate64, (int d, off64_t n), (d, n), hit_descriptor("truncate", d))
WRAP(int, rename, (const char *a, const char *b), (a, b), hit_path("rename", AT_FDCWD, b))
WRAP(int, renameat, (int c, const char *a, int d, const char *b), (c, a, d, b), hit_path("rename", d, b))
WRAP(int, link, (const char *a, const char *b), (a, b), hit_path("link", AT_FDCWD, b))
WRAP(int, linkat, (int c, const char *a, int d, const char *b, int f), (c, a, d, b, f), hit_path("link", d, b))
WRAP(int, symlink, (const char *a, const char *b), (a, b), hit_path("link", AT_FDCWD, b))
WRAP(int, unlink, (const char *a), (a), hit_path("unlink", AT_FDCWD, a))
WRAP(int, unlinkat, (int d, const char *a, int f), (d, a, f), hit_path("unlink", d, a))
WRAP(int, rmdir, (const char *a), (a), hit_path("unlink", AT_FDCWD, a))
WRAP(int, mkdir, (const char *a, mode_t m), (a, m), hit_path("mkdir", AT_FDCWD, a))

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define WRAP_OPEN(name, folder, parameters, arguments)                                    \
  int name parameters {                                                                   \
    static __typeof__(&name) real;                                                        \
    if (!real) real = REAL(name);                                                         \
    va_list more;                                                                         \
    va_start(more, flags);                                                                \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;               \
    va_end(more);                                                                         \
    return writes(flags) && hit_path("open", folder, path) ? -1 : real arguments;         \
  }

WRAP_OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(openat, d, (int d, const char *path, int flags, ...), (d, path, flags, mode))
WRAP_OPEN(openat64, d, (int d, const char *path, int flags, ...), (d, path, flags, mode))

#define WRAP_FOPEN(name)                                                                              \
  FILE *name(const char *path, const char *mode) {                                                    \
    static __typeof__(&name) real;                                                                    \
    if (!real) real = REAL(name);                                                                     \
    return strpbrk(mode, "wa+") && hit_path("open", AT_FDCWD, path) ? NULL : real(path, mode);        \
  }

WRAP_FOPEN(fopen)
WRAP_FOPEN(fopen64)
