// The instructions of AMX, the matrix unit of Intel's processors, under names that say what they do.
//
// A tile register holds up to 16 rows of up to 64 bytes, as the configuration that is loaded says. Which
// register an instruction works on is part of its code, and so a template argument here. Compilers' own
// intrinsics take it as a token alone, and GCC's do not say which memory they read.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA::amx {

inline constexpr int kRows = 16, kRowBytes = 64;  // the most of a tile
inline constexpr int kTiles = 8;

// In the layout of memory that the processor loads.
struct Config {
    uint8_t palette;  // 1: the tiles as above; 0: none
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];

    void set(int tile, int64_t tile_rows, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(Config) == 64);

}  // namespace fastres::cpu::FASTRES_ISA::amx

#if defined(FASTRES_EMULATE_AMX)
#include "emu/amx_tiles.h"
#else

namespace fastres::cpu::FASTRES_ISA::amx {

// Zeroes all tiles.
inline void load_config(const Config& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

// Back to no configuration: the system has less to save when it runs another thread.
inline void release() {
    asm volatile("tilerelease" : : : "memory");
}

template <int tile>
FASTRES_ALWAYS void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

template <int tile>
FASTRES_ALWAYS void load(const float* rows, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}

template <int tile>
FASTRES_ALWAYS void store(float* rows, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}

// sums[m][n] += the products of pairs of bf16 a[m][k] and b[k][n]
template <int sums, int a, int b>
FASTRES_ALWAYS void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace fastres::cpu::FASTRES_ISA::amx

#endif
