/* Owns a test double of the CUDA libraries that ONNX Runtime's CUDA provider links: one source, linked once
 * for each library name by build.sh.
 *
 * Invariant: device memory is zeroed host memory, copies copy, launches do nothing and say so by success, but for those
 * whose results the engine reads: they write zeros. So sessions are built, kernels are chosen and inputs are checked as
 * on a GPU, and every number is meaningless.
 * While a stream is captured, what CUDA forbids then (waiting for a stream, memory that is taken or given back,
 * copies that wait) fails as it does on a GPU.
 * GLMSERVE_STUB_CAPABILITY (for example 8.0) is the compute capability, GLMSERVE_STUB_DRIVER the version of CUDA that the
 * driver is for (13000); GLMSERVE_STUB_FAIL=launch makes
 * launches fail, =graph those of captured graphs, =memory allocations beyond GLMSERVE_STUB_MEMORY bytes. =701 makes
 * launches of both kinds fail; any other number is a sticky error, which the next launch returns and then every
 * later call of the runtime in this process. With GLMSERVE_STUB_WHEN=PATH this is so only while a file PATH exists;
 * what is sticky stays. GLMSERVE_STUB_GRAPH_MS is how long the launch of a captured graph takes.
 * GLMSERVE_STUB_LOG=PATH appends a line to a file for each call that costs time on a GPU: `kernel NAME GRID`, `gemm NAME`,
 * `graph`, `copy KIND BYTES`, `set BYTES`, `malloc BYTES`, `free`, `wait`, and `event`; those of a stream that is being
 * captured too.
 * Offsets and numbers are those of CUDA 13's driver_types.h. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

/* ERROR_LAUNCH is cudaErrorLaunchOutOfResources: the next launch may succeed. */
enum { OK = 0, ERROR_MEMORY = 2, ERROR_LAUNCH = 701, ERROR_CAPTURE = 900, ALIGNMENT = 512, SIZE_OF_PROPERTIES = 1008 };

static int handle; /* What every created thing points to: nothing looks inside. */

static int capability(void) {
    const char *text = getenv("GLMSERVE_STUB_CAPABILITY");
    int major, minor;
    if (!text || sscanf(text, "%d.%d", &major, &minor) != 2) return 80;
    return major * 10 + minor;
}

/* What is to fail now, or "". */
static const char *failing(void) {
    const char *text = getenv("GLMSERVE_STUB_FAIL"), *path = getenv("GLMSERVE_STUB_WHEN");
    return text && (!path || !access(path, F_OK)) ? text : "";
}

static int fails(const char *kind) { return !strcmp(failing(), kind); }

/* The sticky error, once there is one. Each library of the double has its own: only the runtime's launches set it,
 * so cuBLAS goes on. */
static int sticky;
static int lost(void) { return __atomic_load_n(&sticky, __ATOMIC_RELAXED); }
static int unless_lost(int result) { return lost() ? lost() : result; }

static size_t memory(void) {
    const char *text = getenv("GLMSERVE_STUB_MEMORY");
    return text ? strtoull(text, NULL, 10) : (size_t)80 << 30;
}

static int shared_memory_optin(void) {
    switch (capability()) {
        case 75: return 65536;
        case 80: return 166912;
        case 89: return 101376;
        default: return 232448;
    }
}

/* Properties and attributes */

static void put(void *base, size_t offset, int value) { memcpy((char *)base + offset, &value, sizeof value); }

int cudaGetDeviceProperties(void *properties, int device) {
    (void)device;
    if (lost()) return lost();
    size_t total = memory(), per_block = 49152;
    memset(properties, 0, SIZE_OF_PROPERTIES);
    strcpy(properties, "CUDA stub");
    memcpy((char *)properties + 288, &total, sizeof total);
    memcpy((char *)properties + 296, &per_block, sizeof per_block);
    size_t per_multiprocessor = shared_memory_optin() + 1024, optin = shared_memory_optin();
    memcpy((char *)properties + 624, &per_multiprocessor, sizeof per_multiprocessor);
    memcpy((char *)properties + 672, &optin, sizeof optin);
    put(properties, 304, 65536);                                     /* regsPerBlock */
    put(properties, 308, 32);                                        /* warpSize */
    put(properties, 320, 1024);                                      /* maxThreadsPerBlock */
    put(properties, 324, 1024), put(properties, 328, 1024), put(properties, 332, 64); /* maxThreadsDim */
    put(properties, 336, INT32_MAX), put(properties, 340, 65535), put(properties, 344, 65535); /* maxGridSize */
    put(properties, 360, capability() / 10);
    put(properties, 364, capability() % 10);
    put(properties, 384, 108);                                       /* multiProcessorCount */
    put(properties, 560, 1);                                         /* concurrentKernels */
    put(properties, 588, 1);                                         /* unifiedAddressing */
    put(properties, 596, 40 << 20);                                  /* l2CacheSize */
    put(properties, 604, 2048);                                      /* maxThreadsPerMultiProcessor */
    put(properties, 632, 65536);                                     /* regsPerMultiprocessor */
    put(properties, 688, 32);                                        /* maxBlocksPerMultiProcessor */
    return OK;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    if (lost()) return lost();
    switch (attribute) {
        case 1: *value = 1024; break;                                /* MaxThreadsPerBlock */
        case 8: *value = 49152; break;                               /* MaxSharedMemoryPerBlock */
        case 10: *value = 32; break;                                 /* WarpSize */
        case 12: *value = 65536; break;                              /* MaxRegistersPerBlock */
        case 16: *value = 108; break;                                /* MultiProcessorCount */
        case 38: *value = 40 << 20; break;                           /* L2CacheSize */
        case 39: *value = 2048; break;                               /* MaxThreadsPerMultiProcessor */
        case 75: *value = capability() / 10; break;
        case 76: *value = capability() % 10; break;
        case 81: *value = shared_memory_optin() + 1024; break;       /* MaxSharedMemoryPerMultiprocessor */
        case 97: *value = shared_memory_optin(); break;              /* MaxSharedMemoryPerBlockOptin */
        default: *value = 0;                                         /* MemoryPoolsSupported and the rest */
    }
    return OK;
}

int cudaGetDeviceCount(int *count) { return *count = 1, unless_lost(OK); }
int cudaGetDevice(int *device) { return *device = 0, unless_lost(OK); }
int cudaSetDevice(int device) { return unless_lost(device == 0 ? OK : 101); }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, OK; }
int cudaDriverGetVersion(int *version) {
    const char *text = getenv("GLMSERVE_STUB_DRIVER");
    return *version = text && *text ? atoi(text) : 13000, OK;
}

/* Names and words, as CUDA has them: kernels of the library report one or both without the number. */
static const struct { int code; const char *name, *words; } ERRORS[] = {
    {OK, "cudaSuccess", "no error"},
    {ERROR_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {46, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {214, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {ERROR_LAUNCH, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {999, "cudaErrorUnknown", "unknown error"},
};
enum { NUM_ERRORS = sizeof ERRORS / sizeof *ERRORS };
const char *cudaGetErrorName(int error) {
    for (int at = 0; at < NUM_ERRORS; at++)
        if (ERRORS[at].code == error) return ERRORS[at].name;
    return "cudaErrorOfStub";
}
const char *cudaGetErrorString(int error) {
    for (int at = 0; at < NUM_ERRORS; at++)
        if (ERRORS[at].code == error) return ERRORS[at].words;
    return "a failure that a test asked for";
}

/* Capture: of one stream at a time, in the global mode, in which the ban holds for every thread. */

static int is_capturing, is_invalidated;
static int forbidden(void) { return unless_lost(is_capturing ? (is_invalidated = 1, ERROR_CAPTURE) : OK); }
#define WAITS(name) int name(void) { return note("wait"), forbidden(); }
WAITS(cudaDeviceSynchronize) WAITS(cudaStreamSynchronize) WAITS(cudaEventSynchronize)
int cudaStreamBeginCapture(void) {
    if (lost()) return lost();
    return is_capturing ? ERROR_CAPTURE : (is_invalidated = 0, is_capturing = 1, OK);
}
int cudaStreamEndCapture(void *stream, void **graph) {
    (void)stream;
    int error = unless_lost(is_invalidated ? ERROR_CAPTURE + 1 : OK); /* cudaErrorStreamCaptureInvalidated */
    is_capturing = is_invalidated = 0;
    return *graph = error ? NULL : &handle, error;
}
int cudaStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = is_capturing, unless_lost(OK); }

/* Memory: zeroed, so that what no kernel wrote is finite. The allocation's start lies before the pointer. */

static size_t used;

static int allocate(void **pointer, size_t bytes) {
    char *start = calloc(1, bytes + 2 * ALIGNMENT);
    if (!start) return ERROR_MEMORY;
    char *aligned = (char *)(((uintptr_t)start + 2 * ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    memcpy(aligned - sizeof start, &start, sizeof start);
    memcpy(aligned - sizeof start - sizeof bytes, &bytes, sizeof bytes);
    return *pointer = aligned, OK;
}

/* Returns how much it was. */
static size_t release(void *pointer) {
    char *start;
    size_t bytes;
    memcpy(&start, (char *)pointer - sizeof start, sizeof start);
    memcpy(&bytes, (char *)pointer - sizeof start - sizeof bytes, sizeof bytes);
    return free(start), bytes;
}

static int take(void **pointer, size_t bytes) {
    int error = forbidden();
    if (error) return error;
    note("malloc %zu", bytes);
    if (fails("memory") && used + bytes > memory()) return ERROR_MEMORY;
    __atomic_add_fetch(&used, bytes, __ATOMIC_RELAXED);
    return allocate(pointer, bytes);
}

static int give_back(void *pointer) {
    if (!pointer) return OK;
    int error = forbidden();
    if (error) return error;
    note("free");
    __atomic_sub_fetch(&used, release(pointer), __ATOMIC_RELAXED);
    return OK;
}

int cudaMalloc(void **pointer, size_t bytes) { return take(pointer, bytes); }
int cudaFree(void *pointer) { return give_back(pointer); }
/* The host's memory is not the device's. */
static int take_of_host(void **pointer, size_t bytes) {
    int error = forbidden();
    return error ? error : allocate(pointer, bytes);
}
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return (void)flags, take_of_host(pointer, bytes); }
int cudaMallocHost(void **pointer, size_t bytes) { return take_of_host(pointer, bytes); }
int cudaFreeHost(void *pointer) {
    int error = pointer ? forbidden() : OK;
    if (pointer && !error) release(pointer);
    return error;
}
int cudaFreeAsync(void *pointer, void *stream) { return (void)stream, give_back(pointer); }
int cudaMallocFromPoolAsync(void **pointer, size_t bytes, void *pool, void *stream) {
    return (void)pool, (void)stream, take(pointer, bytes);
}
int cudaMemGetInfo(size_t *available, size_t *total) {
    size_t taken = __atomic_load_n(&used, __ATOMIC_RELAXED);
    *total = memory(), *available = taken < *total ? *total - taken : 0;
    return unless_lost(OK);
}
static const char *const COPIES[] = {"host-host", "host-device", "device-host", "device-device"};
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    note("copy %s %zu", COPIES[kind & 3], bytes);
    return (void)stream, memcpy(to, from, bytes), unless_lost(OK);
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    int error = forbidden();
    return error ? error : cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, void *stream) {
    note("copy %s %zu", COPIES[kind & 3], width * height), (void)stream;
    for (size_t row = 0; row < height; row++)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return unless_lost(OK);
}
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset, int kind) {
    int error = forbidden();
    if (error) return error;
    return (void)symbol, (void)offset, (void)kind, memset(to, 0, bytes), OK;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    note("set %zu", bytes);
    return (void)stream, memset(to, value, bytes), unless_lost(OK);
}
int cudaMemset(void *to, int value, size_t bytes) {
    int error = forbidden();
    return error ? error : cudaMemsetAsync(to, value, bytes, NULL);
}
int cudaPointerGetAttributes(void *attributes, const void *pointer) {
    return (void)pointer, memset(attributes, 0, 88), unless_lost(OK);
}

/* Things that are created */

#define CREATES(name) int name(void **made) { return *made = &handle, unless_lost(OK); }
CREATES(cudaStreamCreate) CREATES(cudaStreamCreateWithFlags) CREATES(cudaEventCreate)
CREATES(cudaEventCreateWithFlags) CREATES(cudaMemPoolCreate) CREATES(cudaGraphInstantiate)
CREATES(cudaLibraryLoadData)
CREATES(cublasCreate_v2) CREATES(cublasLtCreate) CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatmulPreferenceCreate) CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatrixTransformDescCreate)
int cudaEventElapsedTime(float *ms, void *from, void *to) { return (void)from, (void)to, *ms = 1, unless_lost(OK); }
int cudaFuncGetAttributes(void *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, 144);
    return put(attributes, 24, 1024), unless_lost(OK);                           /* maxThreadsPerBlock */
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                           size_t bytes, unsigned flags) {
    return (void)function, (void)threads, (void)bytes, (void)flags, *blocks = 1, unless_lost(OK);
}
int cudaGetDriverEntryPointByVersion(const char *symbol, void **pointer, unsigned version, uint64_t flags,
                                     int *status) {
    (void)symbol, (void)version, (void)flags;
    *pointer = NULL;
    if (status) *status = 1;                                         /* cudaDriverEntryPointSymbolNotFound */
    return unless_lost(OK);
}
void *__cudaRegisterFatBinary(void *binary) { return (void)binary, &handle; }

int __cudaRegisterFunction(void **binary, const void *function, char *code, const char *name) {
    return (void)binary, (void)code, name_kernel(function, name), OK;
}
int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, unless_lost(OK); }
int cudaLibraryGetKernel(const void **kernel, void *library, const char *name) {
    (void)library;
    char *kept = strdup(name);
    return name_kernel(kept, kept), *kernel = kept, unless_lost(OK);
}
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *what, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    (void)lt, (void)what, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)results;
    return *found = wanted > 0, OK;
}
int cublasGetMathMode(void *blas, int *mode) { return (void)blas, *mode = 0, OK; }
const char *cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS_OF_STUB" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }

/* Launches; an error stays until it is asked for, and a sticky one for ever. */

static _Thread_local int last_error;
static int launch(const char *kind) {
    int code = atoi(failing());
    if (code && code != ERROR_LAUNCH) __atomic_store_n(&sticky, code, __ATOMIC_RELAXED);
    return last_error = unless_lost(code || fails(kind) ? ERROR_LAUNCH : OK);
}
static _Thread_local struct { Size grid, block; size_t shared; void *stream; } pushed; /* by `<<<…>>>` */
int __cudaPushCallConfiguration(Size grid, Size block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return unless_lost(OK);
}
int __cudaPopCallConfiguration(Size *grid, Size *block, size_t *shared, void **stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
    return unless_lost(OK);
}
static int launch_kernel(const void *function, Size grid, void **arguments) {
    const char *name = kernels[slot(function)].name;
    note("kernel %s %ux%ux%u", name ? name : "unknown", grid.x, grid.y, grid.z);
    int error = launch("launch");
    if (!error) write_zeros(name, grid, arguments);
    return error;
}
#define LAUNCHES(name)                                                         \
    int name(const void *function, Size grid, Size block, void **arguments) { \
        return (void)block, launch_kernel(function, grid, arguments);          \
    }
LAUNCHES(cudaLaunchKernel) LAUNCHES(__cudaLaunchKernel) LAUNCHES(cudaLaunchCooperativeKernel)
int cudaLaunchKernelExC(const Size *grid, const void *function, void **arguments) {
    return launch_kernel(function, *grid, arguments);
}
int cudaGraphLaunch(void) {
    const char *text = getenv("GLMSERVE_STUB_GRAPH_MS");
    int ms = text ? atoi(text) : 0;
    note("graph");
    if (ms > 0) nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
    return launch("graph");
}
int cudaPeekAtLastError(void) { return unless_lost(last_error); }
int cudaGetLastError(void) {
    int error = last_error;
    return last_error = OK, unless_lost(error);
}

/* Products of cuBLAS, whose kernels nobody names here */

#define PRODUCTS(name) int name(void) { return note("gemm " #name), unless_lost(OK); }
PRODUCTS(cublasDgeam) PRODUCTS(cublasDgemmBatched) PRODUCTS(cublasDgemmStridedBatched) PRODUCTS(cublasDgemm_v2)
PRODUCTS(cublasGemmBatchedEx) PRODUCTS(cublasGemmEx) PRODUCTS(cublasGemmStridedBatchedEx) PRODUCTS(cublasLtMatmul)
PRODUCTS(cublasScopy_v2) PRODUCTS(cublasSgeam) PRODUCTS(cublasSgemmBatched) PRODUCTS(cublasSgemmStridedBatched)
PRODUCTS(cublasSgemm_v2) PRODUCTS(cublasSscal_v2)
#define EVENTS(name) int name(void) { return note("event"), unless_lost(OK); }
EVENTS(cudaEventRecord) EVENTS(cudaEventRecordWithFlags)

/* What does nothing */

#define NOTHING(name) int name(void) { return unless_lost(OK); }
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaRegisterVar) NOTHING(__cudaUnregisterFatBinary)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cudaEventDestroy) NOTHING(cudaFuncSetAttribute)
NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy) NOTHING(cudaKernelSetAttributeForDevice)
NOTHING(cudaLaunchHostFunc) NOTHING(cudaLibraryUnload) NOTHING(cudaMemPoolDestroy)
NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaMemPoolSetAttribute) NOTHING(cudaMemPoolTrimTo)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamWaitEvent)
NOTHING(cublasDestroy_v2) NOTHING(cublasDgetrfBatched) NOTHING(cublasDgetriBatched) NOTHING(cublasSetMathMode)
NOTHING(cublasSetStream_v2) NOTHING(cublasSgetrfBatched) NOTHING(cublasSgetriBatched) 
NOTHING(cublasLtDestroy) NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit) NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute) NOTHING(cublasLtMatrixTransform)
NOTHING(cublasLtMatrixTransformDescDestroy)
