// Owns the tile instructions of llama.cpp's int8 kernels under GCC 12, whose own words for them lie to its
// optimiser: `_tile_loadconfig` reads 64 bytes and says 8, so stores to the other 56 are dropped and the
// instruction faults; loads and stores of tiles do not say that they touch memory at all.
// Included at the top of ggml-cpu/amx/mmq.cpp by llama_cpp.py. The instructions are the same.
#include <immintrin.h>
#if defined(__AMX_INT8__) && defined(__GNUC__) && !defined(__clang__)
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg (%0)" ::"r"((const void *)(config)) : "memory")
#define PEERS_LOADD(tile, base, stride)                                                                   \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride))   \
                     : "memory")
#define PEERS_STORED(tile, base, stride)                                                                  \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void *)(base)), "r"((long)(stride))     \
                     : "memory")
#define _tile_loadd(tile, base, stride) PEERS_LOADD(tile, base, stride)
#define _tile_stored(tile, base, stride) PEERS_STORED(tile, base, stride)
#endif
