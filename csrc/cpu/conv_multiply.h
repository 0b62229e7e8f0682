// sums (+)= a * b: where a convolution spends its time.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

// Which of a's strides is known to be 1.
enum class Follow { either, steps, rows };

// Vectors of 256 bits are multiplied in so few cycles that the instructions around count, the more where
// another thread takes every second turn of the core's front end: with a known stride, and several steps
// in a row, there are 22 a step of a full tile instead of 26. Vectors of 512 bits leave them time enough.
inline constexpr bool kUnrolled = kVectorBytes < 64;

// Neighbouring steps of a row. Told so, the compiler makes a step the constant of an address; it would add
// it to each register of a row's stride.
struct FourWords {
    float word[4];
};

// The sums stay in registers: rows * vectors of them, and `vectors` for b. Each call's are added up by
// themselves before they join those of the calls before: the rounding errors of a long sum grow with the
// length of its parts.
template <class Words, Follow follow, int rows, int vectors, int block>
void multiply_tile(const MultiplyTile& tile) {
    constexpr int lanes = kLanes<float>;
    // An address takes one register, 0, 1 or 2 times another, and a constant.
    constexpr int rows_at_a_pointer = follow == Follow::rows ? rows : 3;
    constexpr int pointers = (rows + rows_at_a_pointer - 1) / rows_at_a_pointer;
    constexpr int unrolled = follow == Follow::either ? 1 : follow == Follow::rows ? 3 : 4;
    // One register more than there are would be needed for a full tile: of the last vector of b, the
    // products take their words of a straight from memory.
    constexpr int registers = kVectorBytes == 64 ? 32 : 16;
    constexpr int in_registers = rows * vectors + vectors + 1 > registers ? vectors - 1 : vectors;
    Vec<float> sums[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[r][v] = Vec<float>{};
    }
    const int64_t row_stride = follow == Follow::rows ? 1 : tile.row_stride;
    const int64_t step_stride = follow == Follow::steps ? 1 : tile.step_stride;
    const float* b = tile.b;
    for (int64_t run = 0; run < tile.run_count; ++run) {
        if (tile.b_runs) b = tile.b + tile.b_runs[run];
        const float* a[pointers];
#pragma GCC unroll 8
        for (int i = 0; i < pointers; ++i)
            a[i] = tile.a + tile.runs[run] + i * rows_at_a_pointer * row_stride;
        const auto multiply_step = [&](int step) FASTRES_INLINE_BODY {
            const auto word = [&](int r) FASTRES_INLINE_BODY {
                const float* row = a[r / rows_at_a_pointer] + r % rows_at_a_pointer * row_stride;
                if constexpr (follow == Follow::steps)
                    return &reinterpret_cast<const FourWords*>(row)->word[step];
                return row + step * step_stride;
            };
            Vec<float> words[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < in_registers; ++v) words[v] = load(b + step * block + v * lanes);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
                for (int v = 0; v < in_registers; ++v)
                    sums[r][v] = Words::multiply_add(sums[r][v], words[v], word(r));
            }
            if constexpr (in_registers < vectors) {
                constexpr int last = vectors - 1;
                words[last] = load(b + step * block + last * lanes);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r)
                    Words::multiply_add_memory(sums[r][last], words[last], word(r));
            }
        };
        const auto advance = [&](int steps) FASTRES_INLINE_BODY {
#pragma GCC unroll 8
            for (int i = 0; i < pointers; ++i) a[i] += steps * step_stride;
            b += steps * block;
        };
        int64_t left = tile.steps;
        for (; left >= unrolled; left -= unrolled) {
#pragma GCC unroll 8
            for (int step = 0; step < unrolled; ++step) multiply_step(step);
            advance(unrolled);
        }
        for (; unrolled > 1 && left > 0; --left) {
            multiply_step(0);
            advance(1);
        }
    }
    float* const out = tile.sums;
    const int64_t sums_stride = tile.sums_stride;
    if (tile.add) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sums[r][v] += load(out + r * sums_stride + v * lanes);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store<false>(out + r * sums_stride + v * lanes, sums[r][v]);
    }
}

template <class Words, int tile_rows, int vectors, int block>
FASTRES_ALWAYS void multiply_rows(const MultiplyTile& tile) {
    if constexpr (tile_rows > 0) {
        if (tile.rows < tile_rows) return multiply_rows<Words, tile_rows - 1, vectors, block>(tile);
        if constexpr (!kUnrolled)
            return multiply_tile<Words, Follow::either, tile_rows, vectors, block>(tile);
        if (tile.step_stride == 1)
            return multiply_tile<Words, Follow::steps, tile_rows, vectors, block>(tile);
        multiply_tile<Words, Follow::rows, tile_rows, vectors, block>(tile);
    }
}

template <class Words, int tile_rows, int tile_vectors, int vectors, int fewest>
FASTRES_ALWAYS void multiply_vectors(const MultiplyTile& tile) {
    constexpr int block = tile_vectors * kLanes<float>;
    if constexpr (vectors > fewest) {
        if (tile.vectors < vectors)
            return multiply_vectors<Words, tile_rows, tile_vectors, vectors - 1, fewest>(tile);
    }
    multiply_rows<Words, tile_rows, vectors, block>(tile);
}

template <class Words, int tile_rows, int tile_vectors, int fewest_vectors>
void multiply(const MultiplyTile& tile) {
    if (tile.prefetch) tile.prefetch->step();
    multiply_vectors<Words, tile_rows, tile_vectors, tile_vectors, fewest_vectors>(tile);
}

}  // namespace fastres::cpu::FASTRES_ISA
