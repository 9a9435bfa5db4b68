/* A slower disk: every fsync and fdatasync takes 4 ms more.
   gcc -shared -fPIC -o slow_fsync.so slow_fsync.c; then LD_PRELOAD=./slow_fsync.so */

#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void wait_more(void)
{
    struct timespec rest = {0, 4000000};

    while (nanosleep(&rest, &rest) != 0)
        ;
}

int fsync(int fd)
{
    wait_more();
    return syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    wait_more();
    return syscall(SYS_fdatasync, fd);
}
