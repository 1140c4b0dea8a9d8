/*
 * Runs commands one after the other, and prints the time and memory that they needed. This program
 * is separate from rrun-bench and small, because a child's ru_maxrss starts with the memory of its
 * parent at the fork.
 *
 *   launch [-r] PROGRAM [ARG…] [';' PROGRAM [ARG…]]…
 *
 * With -r the commands get real-time priority (SCHED_RR 1). On a busy machine, wall times would
 * otherwise mostly consist of waiting for a processor.
 *
 * This program is a subreaper. It adopts and reaps the processes that the commands leave behind (a
 * created container, an init that is exiting), so that their CPU time is counted too. It prints one
 * line of JSON. For each command, the line contains the wall time (from before the fork to after
 * the wait), the peak memory of the largest process, and the exit status. The line also contains
 * the CPU time of all commands together.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static long long cpu_us(void)
{
	struct rusage all;

	getrusage(RUSAGE_CHILDREN, &all);
	return (all.ru_utime.tv_sec + all.ru_stime.tv_sec) * 1000000LL +
	       all.ru_utime.tv_usec + all.ru_stime.tv_usec;
}

int main(int argc, char **argv)
{
	/* The result is written to this copy of standard output, which the commands do not inherit. */
	int result = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
	int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
	const char *comma = "";

	if (argc > 1 && !strcmp(argv[1], "-r")) {
		const struct sched_param lowest = { .sched_priority = 1 };

		if (sched_setscheduler(0, SCHED_RR, &lowest))
			err(2, "sched_setscheduler(SCHED_RR)");
		argv++, argc--;
	}
	if (argc < 2)
		errx(2, "usage: launch [-r] PROGRAM [ARG…] [';' PROGRAM [ARG…]]…");
	if (result < 0 || nothing < 0)
		err(2, "standard output");
	dup2(nothing, STDIN_FILENO);
	dup2(nothing, STDOUT_FILENO);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1))
		err(2, "prctl(PR_SET_CHILD_SUBREAPER)");

	dprintf(result, "{\"commands\":[");
	for (char **command = argv + 1; *command;) {
		char **next = command;
		struct rusage used;
		pid_t pid, ended;
		int status, error;
		int64_t started;

		while (*next && strcmp(*next, ";"))
			next++;
		if (*next)
			*next++ = NULL;

		started = now_ns();
		error = posix_spawnp(&pid, command[0], NULL, NULL, command, environ);
		if (error)
			errx(2, "%s: %s", command[0], strerror(error));
		while ((ended = wait4(-1, &status, 0, &used)) != pid)
			if (ended < 0 && errno != EINTR)
				err(2, "wait4");
		dprintf(result, "%s{\"wall_ns\":%lld,\"peak_kb\":%ld,\"status\":%d}", comma,
			(long long)(now_ns() - started), used.ru_maxrss,
			WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		comma = ",";
		command = next;
	}
	/* The remaining processes should exit soon. If they do not, SIGALRM kills this program. */
	alarm(20);
	while (wait4(-1, NULL, 0, NULL) > 0 || errno == EINTR)
		;
	dprintf(result, "],\"cpu_us\":%lld}\n", cpu_us());
	return 0;
}
