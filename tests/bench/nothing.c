/*
 * The program of the measured containers. It does nothing, or waits to be killed if it has an
 * argument. Its exit status is unusual, so that a test detects a runtime that has not run this
 * program.
 */
#include <unistd.h>

int main(int argc, char **argv)
{
	(void)argv;
	while (argc > 1)
		pause();
	return 42;
}
