// An OCI runtime for machines without cgroup controllers. It removes the limits from the bundle's
// config.json and then executes another runtime. The file name of this program selects the other
// runtime: unlimited-rrun executes rrun, and unlimited-runc executes runc. The program is needed
// because kubelet always requests CPU shares, and a runtime fails if it cannot set a limit.
//
// tests/setup/runc-without-limits does the same, but its shell and sed take more time.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

// Overwrites the content of the braces after each occurrence of `key` with blanks. Nested braces
// are not supported.
static void clear(char *text, const char *key)
{
    for (char *at = text; (at = strstr(at, key)); at++) {
        char *begin = at + strlen(key), *end = strchr(begin, '}');
        if (end && !memchr(begin, '{', (size_t)(end - begin)))
            memset(begin, ' ', (size_t)(end - begin));
    }
}

static void clear_limits(const char *bundle)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/config.json", bundle);
    int file = open(path, O_RDWR | O_CLOEXEC);
    struct stat stat;
    if (file < 0 || fstat(file, &stat) < 0)
        fail(path);
    size_t size = (size_t)stat.st_size;
    char *text = malloc(size + 1);
    if (!text || pread(file, text, size, 0) != stat.st_size)
        fail(path);
    text[size] = 0;
    clear(text, "\"cpu\":{");
    clear(text, "\"memory\":{");
    clear(text, "\"unified\":{");
    if (pwrite(file, text, size, 0) != stat.st_size)
        fail(path);
    close(file);
    free(text);
}

int main(int argc, char **argv)
{
    for (int number = 1; number + 1 < argc; number++)
        if (strcmp(argv[number], "--bundle") == 0)
            clear_limits(argv[number + 1]);
    const char *name = strrchr(argv[0], '-');
    char path[4096];
    const char *places[] = { "/usr/local/bin", "/usr/sbin", "/usr/bin" };
    for (size_t number = 0; name && number < 3; number++) {
        snprintf(path, sizeof path, "%s/%s", places[number], name + 1);
        if (access(path, X_OK) == 0)
            execv(path, argv);
    }
    fail(argv[0]);
}
