/* Owns what the double knows of kernels: their names, the log of all calls that cost time on a GPU, and zeros for
 * results. */

#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned x, y, z; } Size;

/* The log: one write a line, since each library of the double has its own end of it. */

static void note(const char *format, ...) {
    const char *path = getenv("GLMSERVE_STUB_LOG");
    if (!path || !*path) return;
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0) return;
    char line[4096];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (length >= (int)sizeof line) length = sizeof line - 1;
    line[length] = '\n';
    if (write(file, line, (size_t)length + 1) < 0) abort();
    close(file);
}

/* Names of kernels, by the host function that stands for each: an open hash table, filled while libraries load. */

enum { NUM_KERNELS = 1 << 17 };
static struct { const void *function; const char *name; } kernels[NUM_KERNELS];
static size_t slot(const void *function) {
    size_t at = ((uintptr_t)function >> 2) * 0x9E3779B97F4A7C15u >> 40 & (NUM_KERNELS - 1);
    while (kernels[at].function && kernels[at].function != function) at = (at + 1) & (NUM_KERNELS - 1);
    return at;
}
static void name_kernel(const void *function, const char *name) {
    size_t at = slot(function);
    kernels[at].function = function, kernels[at].name = name;
}

/* What the engine reads is written by these: numbers of tokens and logits by casts, candidates by a search, their sum by
 * an addition. Memory that is used again holds anything, and a kernel that does nothing would leave it there. */

static void zero(void *const *output, size_t count) { memset(*output, 0, count * sizeof(float)); }
static size_t int_at(void *argument) { return (size_t)*(int *)argument; }
static void write_zeros(const char *name, Size grid, void **arguments) {
    if (!name) return;
    if (strstr(name, "OP_CastIliE") || strstr(name, "OP_CastIS2_fE")) {
        zero(arguments[1], int_at(arguments[3]));
    } else if (strstr(name, "_BinaryElementWiseSimple") && strstr(name, "OP_AddIfffE")) {
        zero(arguments[2], int_at(arguments[4]));
    } else if (strstr(name, "RadixTopKIf")) {
        zero(arguments[1], grid.x * int_at(arguments[6]));
    }
}
