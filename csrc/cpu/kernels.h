// The inner loops that exist once per instruction set, as a table of function pointers.
//
// Each loop handles a piece that one thread owns; cpu/batch_norm.cpp splits the work and merges the pieces.
// A piece is either *rows* of a channels-last tensor, [rows][channels] with one coefficient a channel, or
// one *plane* of a contiguous tensor: `rows` pixels of a single channel (channels is then 1).
#pragma once

#include <cstdint>

#include "core/bn_math.h"
#include "core/dtype.h"

namespace fastres::cpu {

// The pieces' coefficients are arrays of the accumulation dtype, one entry a channel.
struct MomentsPiece {
    const void* input;
    int64_t rows, channels;
    bn_math::Moments<double>* moments;  // [channels], merged into
};

struct ApplyPiece {  // output = act((input - mean) * scale + shift [+ residual])
    const void* input;
    const void* residual;  // null: no addition
    void* output;
    int64_t rows, channels;
    const void *mean, *scale, *shift;
    bool relu;
    bool stream;  // write past the caches; the pieces are then 64-byte aligned
};

// How a gradient passes an activation: unchanged, by the sign of the stored output, or by that of the
// pre-activation (input - mean) * scale + shift, recomputed.
enum class Mask : int { none = 0, from_output = 1, recomputed = 2 };

struct ReducePiece {  // g = mask(grad);  sum_grad += sum(g);  dot += sum(g * (input - mean))
    const void* grad;
    const void* input;
    const void* output;  // for Mask::from_output
    void* masked_grad;   // g is written here, or null
    void* grad_input;    // scale * g is written here (gradient in evaluation), or null
    int64_t rows, channels;
    const void *mean, *scale, *shift;
    Mask mask;
    double* sum_grad;  // [channels]
    double* dot;       // [channels]
};

struct InputGradPiece {  // grad_input = scale * (mask(grad) - mean_grad - (input - mean) * slope)
    const void* grad;
    const void* input;
    void* grad_input;
    int64_t rows, channels;
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

struct Kernels {
    struct Layout {
        void (*moments)(const MomentsPiece&);
        void (*apply)(const ApplyPiece&);
        void (*reduce)(const ReducePiece&);
        void (*input_grad)(const InputGradPiece&);
    };
    struct Elementwise {
        void (*add_relu)(const AddReluPiece&);
        void (*add_relu_grad)(const AddReluGradPiece&);
    };
    const char* isa;
    Layout rows[kDtypes];
    Layout plane[kDtypes];
    Elementwise elementwise[kDtypes];
};

// One a translation unit; null where the compiler could not build it for this processor family.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace fastres::cpu
