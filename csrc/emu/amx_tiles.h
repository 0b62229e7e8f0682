// The host meaning of cpu/amx_tiles.h, so that the tests run AMX's convolutions on a processor without it.
//
// Values are those of the instructions, bit by bit. What the processor answers with an exception, a wrong
// configuration or tiles that do not fit together, ends the process and says why.
//
// Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TDPBF16PS.
#pragma once

#include <xmmintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastres::cpu::FASTRES_ISA::amx {

struct State {
    Config config;
    alignas(64) unsigned char tiles[kTiles][kRows][kRowBytes];
};

inline thread_local State state{};

inline void require(bool holds, const char* instruction, const char* rule) {
    if (holds) return;
    std::fprintf(stderr, "AMX emulator: %s: %s\n", instruction, rule);
    std::abort();
}

inline void require_configured(int tile, const char* instruction) {
    require(state.config.palette == 1, instruction, "no configuration is loaded");
    require(state.config.rows[tile] > 0, instruction, "the tile is not configured");
}

inline void release() {
    state = {};
}

inline void load_config(const Config& config) {
    constexpr const char* name = "LDTILECFG";
    require(config.palette <= 1, name, "there is no such palette");
    if (config.palette == 0) return release();
    require(config.start_row == 0, name, "the start row is not 0");
    for (unsigned char reserved : config.reserved) require(reserved == 0, name, "a reserved byte is not 0");
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = config.rows[tile], bytes = config.row_bytes[tile];
        require(rows <= kRows, name, "a tile has more than 16 rows");
        require(bytes <= kRowBytes, name, "a row has more than 64 bytes");
        require((rows == 0) == (bytes == 0), name, "a tile has rows without bytes, or bytes without rows");
        require(tile < kTiles || rows == 0, name, "there are 8 tiles");
    }
    state = {};
    state.config = config;
}

template <int tile>
void zero() {
    static_assert(tile >= 0 && tile < kTiles);
    require_configured(tile, "TILEZERO");
    std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
}

template <int tile>
void load(const float* rows, int64_t stride_bytes) {
    zero<tile>();
    for (int row = 0; row < state.config.rows[tile]; ++row)
        std::memcpy(state.tiles[tile][row], reinterpret_cast<const char*>(rows) + row * stride_bytes,
                    state.config.row_bytes[tile]);
}

template <int tile>
void store(float* rows, int64_t stride_bytes) {
    require_configured(tile, "TILESTORED");
    for (int row = 0; row < state.config.rows[tile]; ++row)
        std::memcpy(reinterpret_cast<char*>(rows) + row * stride_bytes, state.tiles[tile][row],
                    state.config.row_bytes[tile]);
}

// With MXCSR as `multiply_add` sets it; not inlined, for a compiler does not know that it matters.
__attribute__((noinline)) inline void multiply_tiles(int sums_tile, int a_tile, int b_tile) {
    constexpr int lanes = kRowBytes / sizeof(float);
    const auto first = [](uint32_t pair) { return bits_to_float(pair << 16); };
    const auto second = [](uint32_t pair) { return bits_to_float(pair & 0xffff0000u); };
    for (int m = 0; m < state.config.rows[a_tile]; ++m) {
        float even[lanes] = {}, odd[lanes] = {}, sums[lanes];
        for (int k = 0; k < state.config.rows[b_tile]; ++k) {
            uint32_t a, b[lanes];
            std::memcpy(&a, state.tiles[a_tile][m] + k * sizeof a, sizeof a);
            std::memcpy(b, state.tiles[b_tile][k], sizeof b);
            for (int n = 0; n < lanes; ++n) {
                even[n] = __builtin_fmaf(first(a), first(b[n]), even[n]);
                odd[n] = __builtin_fmaf(second(a), second(b[n]), odd[n]);
            }
        }
        std::memcpy(sums, state.tiles[sums_tile][m], sizeof sums);
        for (int n = 0; n < lanes; ++n) sums[n] += even[n] + odd[n];
        std::memcpy(state.tiles[sums_tile][m], sums, state.config.row_bytes[sums_tile]);
    }
}

template <int sums, int a, int b>
void multiply_add() {
    constexpr const char* name = "TDPBF16PS";
    static_assert(sums != a && sums != b && a != b, "the tiles are three");
    constexpr int tiles[] = {sums, a, b};
    for (int tile : tiles) require_configured(tile, name);
    const uint8_t* rows = state.config.rows;
    const uint16_t* bytes = state.config.row_bytes;
    for (int tile : tiles) require(bytes[tile] % 4 == 0, name, "a row is not one of words");
    require(rows[sums] == rows[a], name, "the sums have not the first operand's rows");
    require(bytes[sums] == bytes[b], name, "the sums have not the second operand's columns");
    require(bytes[a] == 4 * rows[b], name, "the first operand has not a word for each row of the second");
    // All exceptions masked, to nearest even, subnormal operands and results are zero.
    constexpr unsigned masked = 0x1f80, flush = 0x8000, subnormals_are_zero = 0x0040;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(masked | flush | subnormals_are_zero);
    multiply_tiles(sums, a, b);
    _mm_setcsr(before);
}

}  // namespace fastres::cpu::FASTRES_ISA::amx
