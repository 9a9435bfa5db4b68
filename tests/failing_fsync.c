/* Let fsync and fdatasync fail with EIO while the file named by FSYNC_FAILS exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int sync_file(const char *name, int file)
{
	const char *path = getenv("FSYNC_FAILS");
	if (path && access(path, F_OK) == 0) {
		errno = EIO;
		return -1;
	}
	return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}

int fsync(int file)
{
	return sync_file("fsync", file);
}

int fdatasync(int file)
{
	return sync_file("fdatasync", file);
}
