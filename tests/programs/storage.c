/* LD_PRELOAD: answers of network and FUSE file systems, as words of the variable STORAGE:
 *   read:ERRNO:FIRST:COUNT  the pread()s of shards from the FIRST on, COUNT in this process
 *   part                    every third pread() of a shard returns a third of what was asked for
 *   block:FIRST:SECONDS     the FIRST pread() of a shard takes so long
 *   sync:ERRNO              fsync() of directories
 *   lock:ERRNO              flock()
 *   rename:ERRNO            rename() over a file that is there
 *   rank:N                  on this rank alone
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static const char *word(const char *name) {
    const char *words = getenv("STORAGE"), *own = getenv("OMPI_COMM_WORLD_RANK"), *rank = words ? strstr(words, "rank:") : NULL;
    if (!words || (rank && own && atoi(rank + 5) != atoi(own))) return NULL;
    return strstr(words, name);
}

static int is_shard(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, "-of-0") != NULL;
}

static long reads;

static ssize_t answer(const char *name, int file, void *buffer, size_t count, off_t offset) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, name);
    if (is_shard(file)) {
        long number = __sync_add_and_fetch(&reads, 1), first, times;
        int code, seconds;
        const char *found = word("read:");
        if (found && sscanf(found, "read:%d:%ld:%ld", &code, &first, &times) == 3 && number >= first && number < first + times) {
            errno = code;
            return -1;
        }
        found = word("block:");
        if (found && sscanf(found, "block:%ld:%d", &first, &seconds) == 2 && number == first) sleep(seconds);
        if (word("part") && number % 3 == 0 && count > 2) count /= 3;
    }
    return real(file, buffer, count, offset);
}

ssize_t pread(int file, void *buffer, size_t count, off_t offset) { return answer("pread", file, buffer, count, offset); }
ssize_t pread64(int file, void *buffer, size_t count, off_t offset) { return answer("pread64", file, buffer, count, offset); }

int fsync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync"), code;
    struct stat status;
    const char *found = word("sync:");
    if (found && sscanf(found, "sync:%d", &code) == 1 && !fstat(file, &status) && S_ISDIR(status.st_mode)) {
        errno = code;
        return -1;
    }
    return real(file);
}

int flock(int file, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock"), code;
    const char *found = word("lock:");
    if (found && sscanf(found, "lock:%d", &code) == 1) {
        errno = code;
        return -1;
    }
    return real(file, operation);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename"), code;
    const char *found = word("rename:");
    if (found && sscanf(found, "rename:%d", &code) == 1 && access(to, F_OK) == 0) {
        errno = code;
        return -1;
    }
    return real(from, to);
}
