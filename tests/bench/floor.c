/*
 * Creates the container of the benchmark's config.json with as few system calls as possible. The
 * run time of this program is therefore the time that the kernel itself needs. No container runtime
 * can be faster. The program reads no options and no JSON, stores no state and makes no checks.
 *
 *   floor run CGROUP ROOTFS PROGRAM [ARG…]   creates CGROUP and removes it at the end
 *   floor exec PID CGROUP PROGRAM [ARG…]     runs PROGRAM in the namespaces of the process PID
 *
 * The container has the same mounts as with `runc spec`, including masked and read-only paths, and the
 * same namespaces (all except user and time). The exit status is that of PROGRAM. If a system
 * call fails, this program prints an error and exits with 125.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define FAILED 125

static void try_mount(const char *source, const char *target, const char *type,
		      unsigned long flags, const char *data)
{
	if (mount(source, target, type, flags, data))
		err(FAILED, "mount %s on %s", source, target);
}

static const unsigned long SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC;

static void make_dev(void)
{
	static const struct { const char *path; unsigned minor, major; } nodes[] = {
		{ "dev/null", 3, 1 }, { "dev/zero", 5, 1 }, { "dev/full", 7, 1 },
		{ "dev/random", 8, 1 }, { "dev/urandom", 9, 1 }, { "dev/tty", 0, 5 },
	};
	static const char *const links[][2] = {
		{ "/proc/self/fd", "dev/fd" }, { "/proc/self/fd/0", "dev/stdin" },
		{ "/proc/self/fd/1", "dev/stdout" }, { "/proc/self/fd/2", "dev/stderr" },
		{ "pts/ptmx", "dev/ptmx" },
	};

	try_mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k");
	mkdir("dev/pts", 0755);
	mkdir("dev/shm", 0755);
	mkdir("dev/mqueue", 0755);
	try_mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
		  "newinstance,ptmxmode=0666,mode=0620,gid=5");
	try_mount("shm", "dev/shm", "tmpfs", SAFE, "mode=1777,size=65536k");
	try_mount("mqueue", "dev/mqueue", "mqueue", SAFE, NULL);
	umask(0);
	for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
		if (mknod(nodes[i].path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)))
			err(FAILED, "mknod %s", nodes[i].path);
	for (size_t i = 0; i < sizeof links / sizeof *links; i++)
		if (symlink(links[i][0], links[i][1]))
			err(FAILED, "symlink %s", links[i][1]);
	umask(022);
}

/* The paths are those of `runc spec`. Paths that do not exist are skipped, as runtimes do. */
static void hide_paths(void)
{
	static const char *const masked[] = {
		"proc/acpi", "proc/asound", "proc/kcore", "proc/keys", "proc/latency_stats",
		"proc/timer_list", "proc/timer_stats", "proc/sched_debug", "sys/firmware", "proc/scsi",
	};
	static const char *const read_only[] = {
		"proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger",
	};

	for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
		if (mount("dev/null", masked[i], NULL, MS_BIND, NULL) && errno == ENOTDIR)
			try_mount("tmpfs", masked[i], "tmpfs", MS_RDONLY, NULL);
	for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++) {
		if (mount(read_only[i], read_only[i], NULL, MS_BIND | MS_REC, NULL))
			continue;
		try_mount(NULL, read_only[i], NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | SAFE, NULL);
	}
}

static void become_container(const char *rootfs, char **argv)
{
	static char *const environment[] = { "PATH=/usr/bin:/bin", NULL };

	try_mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL);
	try_mount(rootfs, rootfs, NULL, MS_BIND | MS_REC, NULL);
	if (chdir(rootfs))
		err(FAILED, "chdir %s", rootfs);
	try_mount("proc", "proc", "proc", 0, NULL);
	make_dev();
	try_mount("sysfs", "sys", "sysfs", SAFE | MS_RDONLY, NULL);
	try_mount("cgroup", "sys/fs/cgroup", "cgroup2", SAFE | MS_RELATIME | MS_RDONLY, NULL);
	hide_paths();
	if (syscall(SYS_pivot_root, ".", "."))
		err(FAILED, "pivot_root");
	if (umount2(".", MNT_DETACH))
		err(FAILED, "umount the old root");
	try_mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL);
	if (chdir("/"))
		err(FAILED, "chdir /");
	sethostname("runc", 4);
	setsid();
	execve(argv[0], argv, environment);
	err(FAILED, "execve %s", argv[0]);
}

/* Starts a process directly in the cgroup, waits for it, and returns its exit status. */
static int start_process(int cgroup, uint64_t namespaces, const char *rootfs, char **argv)
{
	struct clone_args args = {
		.flags = CLONE_INTO_CGROUP | namespaces,
		.exit_signal = SIGCHLD,
		.cgroup = cgroup,
	};
	pid_t child = syscall(SYS_clone3, &args, sizeof args);
	int status;

	if (child < 0)
		err(FAILED, "clone3");
	if (child == 0) {
		if (rootfs)
			become_container(rootfs, argv);
		setsid();
		execv(argv[0], argv);
		err(FAILED, "execve %s", argv[0]);
	}
	if (waitpid(child, &status, 0) < 0)
		err(FAILED, "waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int open_directory(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		err(FAILED, "open %s", path);
	return fd;
}

int main(int argc, char **argv)
{
	const uint64_t namespaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC |
				    CLONE_NEWUTS | CLONE_NEWCGROUP;
	int status;

	if (argc >= 5 && !strcmp(argv[1], "run")) {
		if (mkdir(argv[2], 0755))
			err(FAILED, "mkdir %s", argv[2]);
		status = start_process(open_directory(argv[2]), namespaces, argv[3], argv + 4);
		if (rmdir(argv[2]))
			err(FAILED, "rmdir %s", argv[2]);
		return status;
	}
	if (argc >= 5 && !strcmp(argv[1], "exec")) {
		int cgroup = open_directory(argv[3]);
		int container = syscall(SYS_pidfd_open, atoi(argv[2]), 0);

		if (container < 0)
			err(FAILED, "pidfd_open %s", argv[2]);
		if (setns(container, namespaces))
			err(FAILED, "setns to %s", argv[2]);
		return start_process(cgroup, 0, NULL, argv + 4);
	}
	errx(FAILED, "usage: floor run CGROUP ROOTFS PROGRAM… | floor exec PID CGROUP PROGRAM…");
}
