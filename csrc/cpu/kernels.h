// The inner loops that exist once per instruction set, as a table of function pointers.
//
// Each loop handles a piece that one thread owns; cpu/batch_norm.cpp splits the work and merges the pieces.
// A piece is either *rows* of a channels-last tensor, [rows][channels], or *planes* of an image of a
// contiguous one: `rows` pixels of each of `channels` planes, which are plane_stride elements apart.
#pragma once

#include <cstdint>

#include "core/bn_math.h"
#include "core/dtype.h"
#include "cpu/conv_kernels.h"
#include "cpu/mask.h"

namespace fastres::cpu {

// Where a loop over rows keeps its two sums for a while, in the accumulation dtype: [channels].
struct PartialSums {
    void* first;
    void* second;
};

// The pieces' coefficients are arrays of the accumulation dtype, one entry a channel.
struct ShiftedSumsPiece {  // sum += sum(input - shift);  sum_of_squares += sum((input - shift)^2)
    const void* input;
    int64_t rows, channels, plane_stride;
    const void* shift;
    bool in_double;  // from the first addition on: few values, whose errors do not average out
    PartialSums partial;
    double* sum;             // [channels]
    double* sum_of_squares;  // [channels]
};

struct ApplyPiece {  // output = act((input - mean) * scale + shift [+ residual])
    const void* input;
    const void* residual;  // null: no addition
    void* output;
    int64_t rows, channels, plane_stride;
    const void *mean, *scale, *shift;
    bool relu;
    bool stream;  // write past the caches; the pieces are then 64-byte aligned
};

struct ReducePiece {  // g = mask(grad);  sum_grad += sum(g);  dot += sum(g * (input - mean))
    const void* grad;
    const void* input;
    const void* output;  // for Mask::from_output
    void* masked_grad;   // g is written here, for Mask::from_output
    void* grad_input;    // scale * g is written here (gradient in evaluation), or null
    int64_t rows, channels, plane_stride;
    const void *mean, *scale, *shift;
    Mask mask;
    bool in_double;  // as of ShiftedSumsPiece
    PartialSums partial;
    double* sum_grad;  // [channels]
    double* dot;       // [channels]
};

struct InputGradPiece {  // grad_input = scale * (mask(grad) - mean_grad - (input - mean) * slope)
    const void* grad;
    const void* input;
    void* grad_input;
    int64_t rows, channels, plane_stride;
    const void *mean, *scale, *shift, *mean_grad, *slope;
    Mask mask;  // none or recomputed
    bool stream;
};

struct AddReluPiece {  // output = relu(input + other)
    const void* input;
    const void* other;
    void* output;
    int64_t numel;
    bool stream;
};

struct AddReluGradPiece {  // grad_input = grad * [output > 0]
    const void* grad;
    const void* output;
    void* grad_input;
    int64_t numel;
    bool stream;
};

struct MaxPoolRow {           // output = the largest of a window's pixels, index = the first that is it
    const void* const* rows;  // [kernel_h], of the input; null outside of the image
    int64_t kernel_h, kernel_w, stride, padding;
    int64_t width, out_width, channels;
    void* output;
    uint8_t* index;
};

struct MaxPoolGradRow {  // grad_input = sum of the gradients of the windows whose largest pixel it is
    struct Window {      // a row of the output
        const void* grad;
        const uint8_t* index;
        int first_tap;  // the index of this row's first pixel in the windows
    };
    const Window* windows;
    int64_t count, kernel_w, stride, padding;
    int64_t width, out_width, channels;
    void* grad_input;
};

struct Loops {
    struct Layout {
        void (*shifted_sums)(const ShiftedSumsPiece&);
        void (*apply)(const ApplyPiece&);
        void (*reduce)(const ReducePiece&);
        void (*input_grad)(const InputGradPiece&);
    };
    struct Elementwise {
        void (*add_relu)(const AddReluPiece&);
        void (*add_relu_grad)(const AddReluGradPiece&);
    };
    struct MaxPool {
        void (*forward)(const MaxPoolRow&);
        void (*backward)(const MaxPoolGradRow&);
    };
    Layout rows, plane;
    Elementwise elementwise;
    MaxPool max_pool;
};

template <class Table>
struct ByDtype {
    const Table* tables[kDtypes];

    constexpr const Table* operator[](Dtype dtype) const { return tables[static_cast<int>(dtype)]; }
};

// What runs with an instruction set: its own loops, or those of a set that it includes.
struct Kernels {
    const char* isa;
    ByDtype<Loops> loops;
    ByDtype<ConvKernels> convolution;  // null: none
};

// What each set has of its own, null where one before it has the same. Constants: a set's code does not run
// where the processor has not the set.
#define FASTRES_DECLARE_UNIT(isa)                  \
    namespace isa {                                \
    extern const ByDtype<Loops> loops;             \
    extern const ByDtype<ConvKernels> convolution; \
    }
FASTRES_DECLARE_UNIT(scalar)  // the baseline of the processor family: SSE2 on x86-64, NEON on Arm
FASTRES_DECLARE_UNIT(avx2)
FASTRES_DECLARE_UNIT(avx512)
FASTRES_DECLARE_UNIT(avx512_bf16)
FASTRES_DECLARE_UNIT(avx512_amx)
#undef FASTRES_DECLARE_UNIT

}  // namespace fastres::cpu
