// The inner loops of the convolutions, as a table of function pointers, one for each instruction set and
// storage type.
//
// All of them work on *words* of 32 bits: a float, or two bf16 that one instruction multiplies and adds. A
// word holds `pack` values that follow each other in the sum: input channels, or pixels for the gradient of
// the weights.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/mask.h"
#include "cpu/prefetch.h"

namespace fastres::cpu {

// sums[row][lane] (+)= sum over runs and steps of a[row][run][step] * b[run][step][lane]
struct MultiplyTile {
    const float* a;
    int64_t row_stride, step_stride;  // words of a, from row to row and from step to step
    const int64_t* runs;              // words of a: where each run begins
    int64_t run_count, steps;         // steps of each run
    const float* b;                   // [run][step][block]
    float* sums;                      // [row][sums_stride]
    int64_t sums_stride;
    int rows, vectors;  // at most those of ConvKernels
    bool add;
    const int64_t* b_runs = nullptr;  // words of b: where each run begins; null: where the last one ends
    bool in_slots = false;            // the steps of a lie as load_steps left them
    Prefetch* prefetch = nullptr;     // a step of which is done meanwhile; null: nothing
};

// A vector of output channels, each of which sums the words of its own group alone:
//   sums[row][lane] = sum over runs, taps and steps of
//       a[row * pixel_step + tap][run][word `step` of the lane's group] * b[run][tap][step][lane]
struct MultiplyGroups {
    const float* a;        // the first lane's group
    int64_t pixel_stride;  // words of a, from one pixel to the next
    const int64_t* runs;   // words of a: where each run of taps begins
    int64_t run_count;
    int taps, pixel_step;  // one tap and one pixel, or three taps and at most kMostPixelStep
    int64_t steps;         // words of a group
    const int32_t* words;  // [step][lane], steps up to the lanes of a vector: see group_words
    const float* b;        // [run][tap][step][block]
    float* sums;           // [row][sums_stride]
    int64_t sums_stride;
    int rows;  // at most ConvKernels::group_rows
};
inline constexpr int kMostPixelStep = 2;

// The gradient of such a vector's weights, in which words are pixels:
//   sums[tap][channel][lane] (+)= sum over runs and steps of
//       input[tap][run][step][channel of the lane's group] * grad[run][step][lane]
struct MultiplyGroupPixels {
    const float *grad, *input;  // [step][lane] of one run after the other; the first lane's group
    int64_t input_stride;       // words of input, from one step to the next
    int64_t vector_stride;      // and from one vector of a large group's channels to the next
    const int64_t* runs;        // words of input: where each run begins
    int64_t run_count, steps;
    const int64_t* taps;  // words of input: where each tap begins
    int64_t tap_count;
    int64_t channels;      // of a group
    const int32_t* words;  // [channel][lane]: see group_words
    float* sums;           // [tap][channel][sums_stride]
    int64_t sums_stride;
    bool add;
};

// What is done with a value when it is loaded.
enum class Prologue : int {
    none = 0,
    activation = 1,  // act(batch_norm(value)), by mean, scale and shift
    gradient = 2,    // the gradient of batch_norm's input, by all coefficients; value is that of its output
};

// Arrays of one float a channel; the names are those of InputGradPiece in cpu/kernels.h.
struct PrologueCoefficients {
    Prologue kind;
    const float *mean, *scale, *shift, *mean_grad, *slope;
    bool relu;  // of the activation
    Mask mask;  // of the gradient: none or recomputed
};

// Pixels of one image row, at column, column + column_step, ...; zero beyond the row, after the prologue.
struct PixelRow {
    const void* row;    // of the tensor, at its first channel; null: zero throughout
    const void* input;  // batch norm's, at the same place, for Prologue::gradient
    int64_t width;      // pixels of the tensor's row
    int64_t pixel_stride;
    int64_t column, column_step, columns;
    int64_t first_channel, channels;
    PrologueCoefficients prologue;
};

// Where the sums of a tile go: output = act(sums * scale + shift + residual), as far as these are given; or
// output = sums, with the moments of the output.
struct StoreTile {
    const float* sums;  // [row][sums_stride]
    int64_t sums_stride;
    int rows;
    int64_t channels;
    void* output;                // the first row's, and so the residual
    const void* residual;        // or null
    int64_t row_stride;          // elements of output and residual from one row to the next
    const float *scale, *shift;  // or null
    bool relu;
    bool stream;  // write past the caches; each row's channels are then whole, aligned cache lines
    // Sums over the rows of (output - about) and of its square, added to what is there; or null.
    const float* about;
    float* sum;
    float* sum_of_squares;
};

// A matrix [k][n] of weights in a tensor of any layout.
struct WeightBlock {
    void* data;
    Dtype dtype;
    int64_t k, n, k_stride, n_stride;
};

// A matrix of vectors, `count` floats each, to one that a linear map makes of it.
struct MatrixTransform {
    const float* in;
    int64_t in_row, in_column;  // floats from one to the next
    float* out;
    int64_t out_row, out_column;
    int64_t count;
};

struct ConvKernels {
    int pack;
    int block;      // lanes of a tile, in vectors of block / vectors
    int vectors;    // the most of a tile
    int tile_rows;  // the most of a tile
    int row_grain;  // tiles are cut to multiples of so many rows, but for the last of a stretch
    void (*multiply)(const MultiplyTile&);
    // words[column][ceil(channels / pack)], pairs of channels
    void (*load_channels)(const PixelRow&, float* words);
    // words[channel / width][ceil(columns / pack)][width], pairs of columns; block_stride words from one
    // block of `width` channels to the next
    void (*load_pixels)(const PixelRow&, int64_t width, float* words, int64_t block_stride);
    // words[channel][slot], pairs of columns: steps from `first_step` on of a run of `steps`, which begins
    // at `words`; channel_stride words from one channel to the next. slots_of(steps) says how many there
    // are. Null where multiply takes any step_stride of a; else it takes 1 alone.
    void (*load_steps)(const PixelRow&, float* words, int64_t channel_stride, int64_t first_step,
                       int64_t steps);
    // words[ceil(k / pack)][block], pairs of k; zero beyond n
    void (*pack_weight)(const WeightBlock&, float* words);
    // weight[k][n] = sums[k][n], whose rows are sums_stride apart
    void (*unpack_weight)(const float* sums, int64_t sums_stride, const WeightBlock&);
    void (*store)(const StoreTile&);
    int group_rows;
    void (*multiply_groups)(const MultiplyGroups&);
    void (*multiply_group_pixels)(const MultiplyGroupPixels&);
    // Winograd's, of float words: 4x4 -> 4x4, 3x3 -> 4x4, 4x4 -> 2x2, 2x2 -> 4x4, 4x4 -> 3x3.
    void (*transform_input)(const MatrixTransform&);
    void (*transform_weight)(const MatrixTransform&);
    void (*transform_output)(const MatrixTransform&);
    void (*transform_output_grad)(const MatrixTransform&);
    void (*transform_weight_grad)(const MatrixTransform&);
    // Gives back what multiply set up in the processor, at the end of a thread's task and before it runs
    // anything but these loops; null: nothing.
    void (*release)();
    // The same for fewer output channels: a narrower block, of more rows; null: there is none.
    const ConvKernels* narrower = nullptr;
};

// The steps that multiply takes at once from a run, where they begin at aligned words of memory: equal
// parts of a slot of 16 if it can be, 28 are 14 and 14; else all 16 of it.
struct Slots {
    static constexpr int64_t kSize = 16;

    int64_t count, steps;  // steps of each

    explicit Slots(int64_t run) : count((run + kSize - 1) / kSize), steps(kSize) {
        if (count > 0 && run % count == 0) steps = run / count;
    }
};

}  // namespace fastres::cpu
