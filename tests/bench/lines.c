// The program of the container whose log is measured. `lines COUNT` writes lines of 100 bytes,
// numbered from 0. Like a program that logs, it uses one write(2) for each line. The last line
// contains the program's own CPU time in microseconds, which the benchmark subtracts.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static void put(const char *text, size_t length)
{
    while (length > 0) {
        ssize_t written = write(1, text, length);
        if (written < 0)
            exit(1);
        text += written;
        length -= (size_t)written;
    }
}

int main(int argc, char **argv)
{
    long count = argc > 1 ? atol(argv[1]) : 0;
    char line[101];
    memset(line, 'x', sizeof line);
    line[99] = '\n';
    for (long number = 0; number < count; number++) {
        char digits[11];
        snprintf(digits, sizeof digits, "%09ld ", number % 1000000000);
        memcpy(line, digits, 10);
        put(line, 100);
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    int length = snprintf(line, sizeof line, "own %ld\n",
                          (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000L +
                              usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
    put(line, (size_t)length);
    return 0;
}
