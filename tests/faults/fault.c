// A library to be preloaded: the n-th call of a function on a path fails, is cut short, or is where
// the process is killed. Compiled by tests/faults/library.py; rules are set through ctypes.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL, FAIL_ALWAYS, KILL_BEFORE, KILL_AFTER, SHORT };
struct rule { char call[32]; char path[512]; int nth, action, error, seen, used; };
static struct rule rules[8];
static int number = 0;

int fault_add(const char *call, const char *path, int nth, int action, int error) {
    struct rule *rule = &rules[number];
    memset(rule, 0, sizeof *rule);
    snprintf(rule->call, sizeof rule->call, "%s", call);
    snprintf(rule->path, sizeof rule->path, "%s", path);
    rule->nth = nth; rule->action = action; rule->error = error;
    return number++;
}
int fault_seen(int index) { return rules[index].seen; }
void fault_clear(void) { number = 0; }

static const char *names[65536];
static int named = 0;
const char *fault_name(int index) { return index < named ? names[index] : ""; }

// The path that a call is about: a descriptor's, or a name below one.
static void resolve(int fd, const char *name, char *out, size_t size) {
    char link[64], base[2048] = "";
    if (name && name[0] == '/') { snprintf(out, size, "%s", name); return; }
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        long got = syscall(SYS_readlink, link, base, sizeof base - 1); // not the wrapped one
        base[got < 0 ? 0 : got] = 0;
    }
    snprintf(out, size, "%s%s%s", base, name ? "/" : "", name ? name : "");
}

// 0: call; 1: fail with errno set; 2: call, then die; 3: cut short. errno stays as it is otherwise:
// who calls readdir tells the end of a folder from an error by it.
static int decide(const char *call, int fd, const char *name) {
    int verdict = 0, before = errno;
    for (int i = 0; i < number; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->call, "*") && strcmp(rule->call, call)) continue;
        char path[4096];
        resolve(fd, name, path, sizeof path);
        if (!strstr(path, rule->path)) continue;
        rule->seen++;
        if (rule->action == COUNT) { if (named < 65536) names[named++] = call; continue; }
        if (rule->action == FAIL_ALWAYS && rule->seen >= rule->nth) { errno = rule->error; return 1; }
        if (rule->seen != rule->nth) continue;
        if (rule->action == FAIL) { errno = rule->error; return 1; }
        if (rule->action == KILL_BEFORE) kill(getpid(), SIGKILL);
        if (rule->action == KILL_AFTER) verdict = 2;
        if (rule->action == SHORT) verdict = 3;
    }
    errno = before;
    return verdict;
}

#define WRAP_AS(failed, type, name, parameters, arguments, fd, path)                               \
    type name parameters {                                                                         \
        static type(*real) parameters;                                                             \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                 \
        int verdict = number ? decide(#name, fd, path) : 0;                                        \
        if (verdict == 1) return failed;                                                           \
        type result = real arguments;                                                              \
        if (verdict == 2) kill(getpid(), SIGKILL);                                                 \
        return result;                                                                             \
    }
#define WRAP(...) WRAP_AS(-1, __VA_ARGS__)

WRAP(int, fsync, (int fd), (fd), fd, NULL)
WRAP(int, fdatasync, (int fd), (fd), fd, NULL)
WRAP(int, close, (int fd), (fd), fd, NULL)
WRAP(int, flock, (int fd, int how), (fd, how), fd, NULL)
WRAP(int, ftruncate64, (int fd, off_t size), (fd, size), fd, NULL)
WRAP(int, fallocate64, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), fd, NULL)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), -1, path)
WRAP(int, rmdir, (const char *path), (path), -1, path)
WRAP(int, unlink, (const char *path), (path), -1, path)
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), fd, path)
WRAP(int, link, (const char *from, const char *to), (from, to), -1, to)
WRAP(int, linkat, (int a, const char *from, int b, const char *to, int flags),
     (a, from, b, to, flags), b, to)
WRAP(int, symlink, (const char *from, const char *to), (from, to), -1, to)
WRAP(int, rename, (const char *from, const char *to), (from, to), -1, to)
WRAP(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags),
     (a, from, b, to, flags), b, to)
WRAP(int, stat64, (const char *path, struct stat64 *out), (path, out), -1, path)
WRAP(int, lstat64, (const char *path, struct stat64 *out), (path, out), -1, path)
WRAP(int, fstat64, (int fd, struct stat64 *out), (fd, out), fd, NULL)
WRAP(int, fstatat64, (int fd, const char *path, struct stat64 *out, int flags),
     (fd, path, out, flags), fd, path)
WRAP(int, statx, (int fd, const char *path, int flags, unsigned mask, struct statx *out),
     (fd, path, flags, mask, out), fd, path)
WRAP(int, statvfs64, (const char *path, struct statvfs64 *out), (path, out), -1, path)
WRAP(int, fstatvfs64, (int fd, struct statvfs64 *out), (fd, out), fd, NULL)
WRAP(int, access, (const char *path, int mode), (path, mode), -1, path)
WRAP(int, faccessat, (int fd, const char *path, int mode, int flags), (fd, path, mode, flags), fd,
     path)
WRAP(ssize_t, readlink, (const char *path, char *out, size_t size), (path, out, size), -1, path)
WRAP(ssize_t, readlinkat, (int fd, const char *path, char *out, size_t size),
     (fd, path, out, size), fd, path)
WRAP(off_t, lseek64, (int fd, off_t at, int whence), (fd, at, whence), fd, NULL)
WRAP_AS(NULL, DIR *, opendir, (const char *path), (path), -1, path)
WRAP_AS(NULL, DIR *, fdopendir, (int fd), (fd), fd, NULL)
WRAP_AS(NULL, struct dirent64 *, readdir64, (DIR *folder), (folder), dirfd(folder), NULL)

// Those that may transfer less than they were asked for; `cut` is the shorter call.
#define TRANSFER(name, parameters, arguments, cut)                                                 \
    ssize_t name parameters {                                                                      \
        static ssize_t(*real) parameters;                                                          \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                 \
        int verdict = number ? decide(#name, fd, NULL) : 0;                                        \
        if (verdict == 1) return -1;                                                               \
        ssize_t result = verdict == 3 ? real cut : real arguments;                                 \
        if (verdict == 2) kill(getpid(), SIGKILL);                                                 \
        return result;                                                                             \
    }

static size_t half(size_t size) { return size > 1 ? size / 2 : size; }
static const struct iovec *first_half(const struct iovec *whole) {
    static _Thread_local struct iovec part;
    part = *whole;
    part.iov_len = half(part.iov_len);
    return &part;
}

TRANSFER(read, (int fd, void *data, size_t n), (fd, data, n), (fd, data, half(n)))
TRANSFER(write, (int fd, const void *data, size_t n), (fd, data, n), (fd, data, half(n)))
TRANSFER(pread64, (int fd, void *data, size_t n, off_t at), (fd, data, n, at),
         (fd, data, half(n), at))
TRANSFER(pwrite64, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at),
         (fd, data, half(n), at))
TRANSFER(readv, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, first_half(v), 1))
TRANSFER(writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, first_half(v), 1))
TRANSFER(preadv64, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at),
         (fd, first_half(v), 1, at))
TRANSFER(preadv64v2, (int fd, const struct iovec *v, int n, off_t at, int flags),
         (fd, v, n, at, flags), (fd, first_half(v), 1, at, flags))
TRANSFER(pwritev64v2, (int fd, const struct iovec *v, int n, off_t at, int flags),
         (fd, v, n, at, flags), (fd, first_half(v), 1, at, flags))

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        static int (*real)(const char *, int, ...);                                                \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);     \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                 \
        int verdict = number ? decide("open", -1, path) : 0;                                       \
        if (verdict == 1) return -1;                                                               \
        int result = real(path, flags, mode);                                                      \
        if (verdict == 2) kill(getpid(), SIGKILL);                                                 \
        return result;                                                                             \
    }
OPEN(open)
OPEN(open64)

int openat64(int fd, const char *path, int flags, ...) {
    static int (*real)(int, const char *, int, ...);
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
    if (!real) real = dlsym(RTLD_NEXT, "openat64");
    int verdict = number ? decide("open", fd, path) : 0;
    if (verdict == 1) return -1;
    int result = real(fd, path, flags, mode);
    if (verdict == 2) kill(getpid(), SIGKILL);
    return result;
}

int fcntl64(int fd, int command, ...) {
    static int (*real)(int, int, ...);
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    if (!real) real = dlsym(RTLD_NEXT, "fcntl64");
    int verdict = number ? decide("fcntl64", fd, NULL) : 0;
    if (verdict == 1) return -1;
    int result = real(fd, command, argument);
    if (verdict == 2) kill(getpid(), SIGKILL);
    return result;
}
