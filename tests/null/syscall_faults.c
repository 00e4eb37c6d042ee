/* Preloaded before a test's child process: writes down, or refuses, what it asks of the files under one folder.
 *
 * FAULT_ROOT is the folder. FAULT_LOG, when set, receives one record for each operation, so that a test can build
 * the disk of a machine that stopped between any two of them. fault_arm(n, error, sticky) refuses operation n from
 * now on. SQLite and Python are seen alike, but neither mapped memory nor what C's stdio writes. Shared-memory
 * files (-shm) are left out: SQLite makes them anew. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long counted = 0, armed = -1;
static int refusal = 0, stays = 0;

long fault_count(void) { return counted; }

void fault_arm(long at, int error, int sticky) {
    counted = 0;
    armed = at;
    refusal = error;
    stays = sticky;
}

static int watched(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    size_t length = strlen(path);
    return root && !strncmp(path, root, strlen(root)) && !(length > 4 && !strcmp(path + length - 4, "-shm"));
}

static int name_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX);
    if (length <= 0 || length >= PATH_MAX) return 0;
    path[length] = 0;
    return path[0] == '/' && watched(path);
}

static void put_all(int descriptor, const void *data, size_t length) {
    for (const char *at = data; length;) {
        ssize_t done = syscall(SYS_write, descriptor, at, length);
        if (done <= 0) abort();
        at += done;
        length -= done;
    }
}

/* One record: kind, two names, offset or size, data. */
static void record(char kind, const char *first, const char *second, uint64_t offset, const void *data, uint64_t length) {
    const char *log = getenv("FAULT_LOG");
    if (!log) return;
    int saved = errno, descriptor = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (descriptor < 0) abort();
    uint64_t sizes[4] = {strlen(first), strlen(second), offset, length};
    put_all(descriptor, &kind, 1);
    put_all(descriptor, sizes, sizeof sizes);
    put_all(descriptor, first, sizes[0]);
    put_all(descriptor, second, sizes[1]);
    put_all(descriptor, data, length);
    syscall(SYS_close, descriptor);
    errno = saved;
}

static int refused(void) {
    long number = counted++;
    if (armed < 0 || number < armed || (number > armed && !stays)) return 0;
    errno = refusal;
    return 1;
}

static int open_watched(const char *path, int flags, mode_t mode) {
    int seen = (flags & (O_CREAT | O_TRUNC)) && path[0] == '/' && watched(path);
    int made = seen && (flags & O_CREAT) && syscall(SYS_access, path, F_OK) != 0;
    int emptied = seen && (flags & O_TRUNC) && !made;
    if ((made || emptied) && refused()) return -1;
    int descriptor = syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (made && descriptor >= 0) record('O', path, "", 0, "", 0);
    if (emptied && descriptor >= 0) record('T', path, "", 0, "", 0);
    return descriptor;
}

static mode_t mode_of(int flags, va_list arguments) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; }

#define OPEN(name)                                     \
    int name(const char *path, int flags, ...) {       \
        va_list arguments;                             \
        va_start(arguments, flags);                    \
        mode_t mode = mode_of(flags, arguments);       \
        va_end(arguments);                             \
        return open_watched(path, flags, mode);        \
    }
OPEN(open)
OPEN(open64)

static ssize_t write_at(int descriptor, const void *data, size_t length, off64_t offset, int at) {
    char path[PATH_MAX + 1];
    int seen = name_of(descriptor, path);
    if (seen && refused()) return -1;
    off64_t start = at ? offset : lseek64(descriptor, 0, SEEK_CUR);
    ssize_t done = at ? syscall(SYS_pwrite64, descriptor, data, length, offset) : syscall(SYS_write, descriptor, data, length);
    if (seen && done > 0) record('W', path, "", start, data, done);
    return done;
}

ssize_t write(int descriptor, const void *data, size_t length) { return write_at(descriptor, data, length, 0, 0); }
ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) {
    return write_at(descriptor, data, length, offset, 1);
}
ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
    return write_at(descriptor, data, length, offset, 1);
}

static int truncate_watched(int descriptor, off64_t size) {
    char path[PATH_MAX + 1];
    int seen = name_of(descriptor, path);
    if (seen && refused()) return -1;
    int done = syscall(SYS_ftruncate, descriptor, size);
    if (seen && !done) record('T', path, "", size, "", 0);
    return done;
}

int ftruncate(int descriptor, off_t size) { return truncate_watched(descriptor, size); }
int ftruncate64(int descriptor, off64_t size) { return truncate_watched(descriptor, size); }

static int sync_watched(int descriptor, long call) {
    char path[PATH_MAX + 1];
    int seen = name_of(descriptor, path);
    if (seen && refused()) return -1;
    int done = syscall(call, descriptor);
    if (seen && !done) record('S', path, "", 0, "", 0);
    return done;
}

int fsync(int descriptor) { return sync_watched(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return sync_watched(descriptor, SYS_fdatasync); }

int rename(const char *from, const char *to) {
    int seen = watched(from) || watched(to);
    if (seen && refused()) return -1;
    int done = NEXT(rename)(from, to);
    if (seen && !done) record('R', from, to, 0, "", 0);
    return done;
}

int unlink(const char *path) {
    int seen = watched(path);
    if (seen && refused()) return -1;
    int done = NEXT(unlink)(path);
    if (seen && !done) record('U', path, "", 0, "", 0);
    return done;
}
