/* Owns a test double of NVIDIA's management library: one GPU, the one that the double of CUDA has.
 *
 * GLMSERVE_STUB_XID=N has the first wait for events report the error N; all other waits last as long as they may. What is
 * missing here the server finds not supported. Numbers are those of nvml.h. */

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10, XID_ERROR = 8 };
typedef unsigned long long Wide;
static int device;

int nvmlInit_v2(void) { return OK; }
int nvmlShutdown(void) { return OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **found) {
    *found = &device;
    return strcmp(uuid, "GPU-00000000-0000-0000-0000-000000000000") ? NOT_FOUND : OK;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    return (void)handle, strncpy(name, "CUDA stub", length), OK;
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, void *memory) {
    struct { unsigned version; Wide total, reserved, free, used; } found = {0, (Wide)80 << 30, 0, (Wide)70 << 30, (Wide)10 << 30};
    return (void)handle, memcpy(memory, &found, sizeof found), OK;
}
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    return (void)handle, rates[0] = 75, rates[1] = 40, OK;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { return (void)handle, *milliwatts = 412500, OK; }
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
    return (void)handle, (void)sensor, *degrees = 61, OK;
}
int nvmlDeviceGetClockInfo(void *handle, int clock, unsigned *megahertz) {
    return (void)handle, (void)clock, *megahertz = 1980, OK;
}
/* The power cap and the hardware's thermal limit. */
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, Wide *reasons) {
    return (void)handle, *reasons = 0x4 | 0x40, OK;
}
int nvmlDeviceGetTotalEccErrors(void *handle, int kind, int counter, Wide *count) {
    return (void)handle, (void)kind, (void)counter, (void)count, NOT_SUPPORTED;
}
int nvmlEventSetCreate(void **set) { return *set = &device, OK; }
int nvmlEventSetFree(void *set) { return (void)set, OK; }
int nvmlDeviceRegisterEvents(void *handle, Wide types, void *set) {
    return (void)handle, (void)set, types == XID_ERROR ? OK : NOT_SUPPORTED;
}
int nvmlEventSetWait_v2(void *set, void *data, unsigned ms) {
    static int has_reported;
    const char *text = getenv("GLMSERVE_STUB_XID");
    struct { void *device; Wide type, number; unsigned instances[2]; } event = {&device, XID_ERROR, text ? strtoull(text, NULL, 10) : 0, {0, 0}};
    if (text && !has_reported++) return (void)set, memcpy(data, &event, sizeof event), OK;
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
    return TIMEOUT;
}
