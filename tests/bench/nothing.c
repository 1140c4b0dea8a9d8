/*
 * The containers' program: does nothing, or with any argument waits to be killed. Its exit status
 * is one that nobody else has, so that a runtime that never ran it is found out.
 */
#include <unistd.h>

int main(int argc, char **argv)
{
	(void)argv;
	while (argc > 1)
		pause();
	return 42;
}
