/* Record, in order, what a server does to its database files, and when each 200 leaves.
 *
 * Preloaded into every process of the server. RECORDER_DATABASE is the path of the
 * database; RECORDER_LOG the log, one record per operation, appended by a single write:
 *
 *   a write, truncate, open or unlink   after it was done, before the caller goes on
 *   a sync                              one record before it starts, one after it ended
 *   a 200                               before it is handed to the kernel
 *
 * So a record of an effect is never earlier than the effect, and a record of an answer is
 * never later than the answer: what is durable is understated, what is promised is not.
 * The event of an answer is the X-Request-Id that was last received on its socket.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 65536
#define EXPORT __attribute__((visibility("default")))
#define REAL(name) \
	static __typeof__(&name) real; \
	if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

enum { NONE, DATABASE, WAL, DIRECTORY };

struct record {
	char kind;          /* O, W, T, U, B (begin of a sync), S (end of it), A, X */
	char name;          /* which file, as above */
	char spare[2];
	uint32_t thread;
	uint64_t inode;
	int64_t offset;     /* of a write; the new length of a truncate */
	uint64_t length;    /* of the data that follows the record */
};

static struct { char name; uint64_t inode; } files[FILES];
static char tags[FILES][64];
static char database[4096], wal[4096], directory[4096];
static int log_file = -1;

__attribute__((constructor)) static void start(void)
{
	const char *path = getenv("RECORDER_DATABASE"), *log = getenv("RECORDER_LOG");
	if (!path || !log)
		return;
	snprintf(database, sizeof database, "%s", path);
	snprintf(wal, sizeof wal, "%s-wal", path);
	snprintf(directory, sizeof directory, "%s", path);
	*strrchr(directory, '/') = 0;
	int file = open(log, O_WRONLY | O_APPEND | O_CREAT, 0600);
	log_file = fcntl(file, F_DUPFD_CLOEXEC, 512);
	close(file);
	if (log_file < 0)
		abort();
}

static void record(char kind, int name, uint64_t inode, int64_t offset, const void *data,
		   size_t length)
{
	struct record head = {.kind = kind, .name = (char)name, .thread = (uint32_t)gettid(),
			      .inode = inode, .offset = offset, .length = length};
	struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, length}};
	if (log_file >= 0 && writev(log_file, parts, 2) != (ssize_t)(sizeof head + length))
		abort();
}

static int known(int file)
{
	return file >= 0 && file < FILES && files[file].name;
}

static int name_of(const char *path)
{
	if (log_file < 0)
		return NONE;
	if (!strcmp(path, database))
		return DATABASE;
	if (!strcmp(path, wal))
		return WAL;
	return strcmp(path, directory) ? NONE : DIRECTORY;
}

static int opened(int file, const char *path, int flags)
{
	struct stat status;
	int name = name_of(path);
	if (file < 0 || file >= FILES)
		return file;
	files[file].name = (char)name;
	tags[file][0] = 0;
	if (name && !fstat(file, &status)) {
		files[file].inode = status.st_ino;
		record((flags & O_TRUNC) ? 'X' : 'O', name, status.st_ino, 0, "", 0);
	}
	return file;
}

#define READ_MODE \
	va_list rest; \
	va_start(rest, flags); \
	mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
	va_end(rest);

#define OPEN(function) \
EXPORT int function(const char *path, int flags, ...) \
{ \
	REAL(function); \
	READ_MODE \
	return opened(real(path, flags, mode), path, flags); \
}
OPEN(open)
OPEN(open64)

#define OPENAT(function) \
EXPORT int function(int folder, const char *path, int flags, ...) \
{ \
	REAL(function); \
	READ_MODE \
	return opened(real(folder, path, flags, mode), path, flags); \
}
OPENAT(openat)
OPENAT(openat64)

EXPORT int close(int file)
{
	REAL(close);
	if (file >= 0 && file < FILES)
		files[file].name = NONE;
	return real(file);
}

#define PWRITE(function, offset_type) \
EXPORT ssize_t function(int file, const void *data, size_t length, offset_type offset) \
{ \
	REAL(function); \
	ssize_t done = real(file, data, length, offset); \
	if (done > 0 && known(file)) \
		record('W', files[file].name, files[file].inode, offset, data, (size_t)done); \
	return done; \
}
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

EXPORT ssize_t write(int file, const void *data, size_t length)
{
	REAL(write);
	off_t offset = known(file) ? lseek(file, 0, SEEK_CUR) : 0;
	ssize_t done = real(file, data, length);
	if (done > 0 && known(file))
		record('W', files[file].name, files[file].inode, offset, data, (size_t)done);
	return done;
}

#define TRUNCATE(function, offset_type) \
EXPORT int function(int file, offset_type length) \
{ \
	REAL(function); \
	int result = real(file, length); \
	if (!result && known(file)) \
		record('T', files[file].name, files[file].inode, length, "", 0); \
	return result; \
}
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(function, offset_type) \
EXPORT int function(int file, offset_type offset, offset_type length) \
{ \
	REAL(function); \
	if (known(file)) \
		record('X', files[file].name, files[file].inode, 0, "", 0); \
	return real(file, offset, length); \
}
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define SYNC(function) \
EXPORT int function(int file) \
{ \
	REAL(function); \
	if (!known(file)) \
		return real(file); \
	record('B', files[file].name, files[file].inode, 0, "", 0); \
	int result = real(file); \
	if (!result) \
		record('S', files[file].name, files[file].inode, 0, "", 0); \
	return result; \
}
SYNC(fsync)
SYNC(fdatasync)

EXPORT int unlink(const char *path)
{
	REAL(unlink);
	struct stat status;
	int name = name_of(path);
	if (name && stat(path, &status))
		name = NONE;
	int result = real(path);
	if (!result && name)
		record('U', name, status.st_ino, 0, "", 0);
	return result;
}

EXPORT int rename(const char *from, const char *to)
{
	REAL(rename);
	if (name_of(from) || name_of(to))
		record('X', NONE, 0, 0, "", 0);
	return real(from, to);
}

EXPORT ssize_t recv(int file, void *data, size_t length, int flags)
{
	static const char mark[] = "X-Request-Id: ";
	REAL(recv);
	ssize_t done = real(file, data, length, flags);
	if (log_file < 0 || done <= 0 || file >= FILES || (flags & MSG_PEEK))
		return done;
	char *end = (char *)data + done;
	char *tag = memmem(data, (size_t)done, mark, sizeof mark - 1);
	if (tag) {
		size_t size = 0;
		for (tag += sizeof mark - 1; tag < end && *tag != '\r' && size < 63; tag++)
			tags[file][size++] = *tag;
		tags[file][size] = 0;
	}
	return done;
}

static void answering(int file, const char *data, size_t length)
{
	static const char mark[] = "HTTP/1.1 200";
	if (log_file < 0 || file < 0 || file >= FILES || !tags[file][0])
		return;
	if (length >= sizeof mark - 1 && !memcmp(data, mark, sizeof mark - 1)) {
		record('A', NONE, 0, 0, tags[file], strlen(tags[file]));
		tags[file][0] = 0;
	}
}

EXPORT ssize_t send(int file, const void *data, size_t length, int flags)
{
	REAL(send);
	answering(file, data, length);
	return real(file, data, length, flags);
}

EXPORT ssize_t sendto(int file, const void *data, size_t length, int flags,
		      const struct sockaddr *address, socklen_t size)
{
	REAL(sendto);
	answering(file, data, length);
	return real(file, data, length, flags, address, size);
}

EXPORT ssize_t sendmsg(int file, const struct msghdr *message, int flags)
{
	REAL(sendmsg);
	if (message->msg_iovlen)
		answering(file, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len);
	return real(file, message, flags);
}
