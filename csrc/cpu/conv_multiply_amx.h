// sums (+)= a * b, of words of two bf16, by AMX's tiles: one instruction adds the product of 16 rows of 16
// words of a, and of 16 steps of 16 lanes of b, to 16 x 16 sums. Both lie in memory as tiles want them, if
// the steps of a follow each other.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

inline constexpr int kAmxSide = amx::kRows;
static_assert(kAmxSide == Slots::kSize);
inline constexpr int kAmxRows = 2 * kAmxSide;  // of a MultiplyTile

// The registers: 2 x 2 of sums, two of a and two of b, so that each that is loaded is multiplied twice.
inline constexpr int kSumsTile = 0, kATile = 4, kBTile = 6;

// Some steps of each run: `count` times `width` from `first` on; those of a are a_step words apart.
struct Steps {
    int64_t first, count, width, a_step;
    int64_t lines;  // to be fetched at each
};

// What the calling thread's tiles are configured for. Other code, PyTorch's too, configures them for its
// own ends, but not before release_tiles.
struct TileShape {
    int rows = 0;  // 0: nothing
    int64_t width = 0;
};
inline thread_local TileShape configured;

inline void release_tiles() {
    configured = {};
    amx::release();
}

// To load a configuration takes some 200 cycles, and to ask for that which is loaded still some 5 % of a
// forward's time.
inline void configure_tiles(int rows, int64_t width) {
    if (configured.rows == rows && configured.width == width) return;
    configured = {rows, width};
    amx::Config wanted{};
    wanted.palette = 1;
    for (int i = 0; i < 2; ++i) {
        const int tile_rows = rows - i * kAmxSide < kAmxSide ? rows - i * kAmxSide : kAmxSide;
        if (tile_rows > 0) {
            wanted.set(kSumsTile + 2 * i, tile_rows, amx::kRowBytes);
            wanted.set(kSumsTile + 2 * i + 1, tile_rows, amx::kRowBytes);
            wanted.set(kATile + i, tile_rows, width * sizeof(float));
        }
        wanted.set(kBTile + i, width, amx::kRowBytes);
    }
    amx::load_config(wanted);
}

// To `out`, or added to what is there.
template <int tile>
FASTRES_ALWAYS void store_sums(float* out, int64_t stride, int rows, bool add) {
    if (!add) return amx::store<tile>(out, stride * sizeof(float));
    alignas(kVectorBytes) float sums[kAmxSide * kAmxSide];
    amx::store<tile>(sums, kAmxSide * sizeof(float));
    for (int row = 0; row < rows; ++row) {
        float* out_row = out + row * stride;
        store<false>(out_row, load(out_row) + load(sums + row * kAmxSide));
    }
}

// Of 1 or 2 tiles of rows and of lanes, from `lane` on. As in conv_multiply.h, the sums of a call begin at
// zero. What is fetched meanwhile comes a few lines at each step: in one go, these would fill all places
// where loads wait for memory, and the tiles with them (1.1 to 1.2 times as long).
template <int block, int row_tiles, int lane_tiles>
void multiply_amx_tiles(const MultiplyTile& tile, const Steps& steps, int64_t lane, bool add) {
    constexpr bool second_rows = row_tiles > 1, second_lanes = lane_tiles > 1;
    constexpr int64_t b_stride = block * sizeof(float);
    const int64_t a_stride = tile.row_stride * sizeof(float);
    const int64_t count = steps.count, a_step = steps.a_step, b_step = steps.width * block;
    const int64_t a_tile = kAmxSide * tile.row_stride, lines = steps.lines;
    amx::zero<kSumsTile>();
    if constexpr (second_lanes) amx::zero<kSumsTile + 1>();
    if constexpr (second_rows) amx::zero<kSumsTile + 2>();
    if constexpr (second_rows && second_lanes) amx::zero<kSumsTile + 3>();
    for (int64_t run = 0; run < tile.run_count; ++run) {
        const float* a = tile.a + tile.runs[run] + steps.first;
        const int64_t b_run = tile.b_runs ? tile.b_runs[run] : run * tile.steps * block;
        const float* b = tile.b + b_run + steps.first * block + lane;
        for (int64_t i = 0; i < count; ++i) {
            amx::load<kATile>(a, a_stride);
            amx::load<kBTile>(b, b_stride);
            amx::multiply_add<kSumsTile, kATile, kBTile>();
            if constexpr (second_lanes) {
                amx::load<kBTile + 1>(b + kAmxSide, b_stride);
                amx::multiply_add<kSumsTile + 1, kATile, kBTile + 1>();
            }
            if constexpr (second_rows) {
                amx::load<kATile + 1>(a + a_tile, a_stride);
                amx::multiply_add<kSumsTile + 2, kATile + 1, kBTile>();
            }
            if constexpr (second_rows && second_lanes)
                amx::multiply_add<kSumsTile + 3, kATile + 1, kBTile + 1>();
            if (lines > 0) tile.prefetch->fetch(lines);
            a += a_step;
            b += b_step;
        }
    }
    float* out = tile.sums + lane;
    const int rows = second_rows ? kAmxSide : tile.rows, more_rows = tile.rows - kAmxSide;
    store_sums<kSumsTile>(out, tile.sums_stride, rows, add);
    if constexpr (second_lanes) store_sums<kSumsTile + 1>(out + kAmxSide, tile.sums_stride, rows, add);
    if constexpr (second_rows) {
        out += kAmxSide * tile.sums_stride;
        store_sums<kSumsTile + 2>(out, tile.sums_stride, more_rows, add);
        if constexpr (second_lanes)
            store_sums<kSumsTile + 3>(out + kAmxSide, tile.sums_stride, more_rows, add);
    }
}

template <int block>
void multiply_amx_steps(const MultiplyTile& tile, const Steps& steps, bool add) {
    configure_tiles(tile.rows, steps.width);
    const bool two = tile.rows > kAmxSide;
    int vector = 0;
    for (; vector + 2 <= tile.vectors; vector += 2) {
        const int64_t lane = vector * kAmxSide;
        two ? multiply_amx_tiles<block, 2, 2>(tile, steps, lane, add)
            : multiply_amx_tiles<block, 1, 2>(tile, steps, lane, add);
    }
    if (vector < tile.vectors) {
        const int64_t lane = vector * kAmxSide;
        two ? multiply_amx_tiles<block, 2, 1>(tile, steps, lane, add)
            : multiply_amx_tiles<block, 1, 1>(tile, steps, lane, add);
    }
}

// Takes a step_stride of 1. What is left over of runs that are not cut into equal parts is added by itself,
// in narrower tiles.
template <int block>
void multiply_amx(const MultiplyTile& tile) {
    const Slots slots(tile.steps);
    const int64_t width = slots.steps, count = tile.steps / width, rest = tile.steps % width;
    const int64_t parts = tile.run_count * count * ((tile.vectors + 1) / 2);
    const int64_t lines = tile.prefetch ? tile.prefetch->lines_of_part(parts) : 0;
    multiply_amx_steps<block>(tile, {0, count, width, tile.in_slots ? kAmxSide : width, lines}, tile.add);
    if (rest > 0) multiply_amx_steps<block>(tile, {tile.steps - rest, 1, rest, rest, 0}, true);
}

}  // namespace fastres::cpu::FASTRES_ISA
