// A library to be preloaded: the n-th call of a function on a path fails, is cut short, or is where
// the process is killed. Compiled by tests/faults/library.py; rules are set through ctypes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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
        ssize_t got = readlink(link, base, sizeof base - 1);
        base[got < 0 ? 0 : got] = 0;
    }
    snprintf(out, size, "%s%s%s", base, name ? "/" : "", name ? name : "");
}

// 0: call; 1: fail with errno set; 2: call, then die; 3: cut short.
static int decide(const char *call, int fd, const char *name) {
    int verdict = 0;
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
    return verdict;
}

#define WRAP(type, name, parameters, arguments, fd, path)                                          \
    type name parameters {                                                                         \
        static type(*real) parameters;                                                             \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                 \
        int verdict = number ? decide(#name, fd, path) : 0;                                        \
        if (verdict == 1) return -1;                                                               \
        type result = real arguments;                                                              \
        if (verdict == 2) kill(getpid(), SIGKILL);                                                 \
        return result;                                                                             \
    }

WRAP(int, fsync, (int fd), (fd), fd, NULL)
WRAP(int, close, (int fd), (fd), fd, NULL)
WRAP(int, flock, (int fd, int how), (fd, how), fd, NULL)
WRAP(int, ftruncate64, (int fd, off_t size), (fd, size), fd, NULL)
WRAP(int, fallocate64, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), fd, NULL)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), -1, path)
WRAP(int, rmdir, (const char *path), (path), -1, path)
WRAP(int, unlink, (const char *path), (path), -1, path)
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), fd, path)
WRAP(int, rename, (const char *from, const char *to), (from, to), -1, to)
WRAP(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags),
     (a, from, b, to, flags), b, to)
WRAP(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), fd, NULL)
WRAP(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off_t at, int flags),
     (fd, v, n, at, flags), fd, NULL)

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    int verdict = number ? decide("pwrite64", fd, NULL) : 0;
    if (verdict == 1) return -1;
    ssize_t result = real(fd, data, verdict == 3 && size > 1 ? size / 2 : size, at);
    if (verdict == 2) kill(getpid(), SIGKILL);
    return result;
}

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
