/* The containers' program: does nothing, or with any argument waits to be killed. */
#include <unistd.h>

int main(int argc, char **argv)
{
	(void)argv;
	while (argc > 1)
		pause();
	return 0;
}
