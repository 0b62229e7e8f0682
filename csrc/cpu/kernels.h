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

struct Kernels {
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
    struct Loops {
        Layout rows, plane;
        Elementwise elementwise;
        MaxPool max_pool;
    };
    const char* isa;
    Loops loops[kDtypes];
    const ConvKernels* convolution[kDtypes];  // null: none
};

// One a translation unit; null where the compiler could not build it for this processor family. Such a unit
// is asked for its table on any processor: it must not run a line of code for that.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// What a unit changes of the unit before it.
struct Bf16Kernels {
    const Kernels::Loops* loops;  // null: nothing
    const ConvKernels* convolution;
};
const Bf16Kernels* avx512_bf16_changes();
const Bf16Kernels* avx512_amx_changes();  // of avx512_bf16

}  // namespace fastres::cpu
