// What a batch-norm kernel is asked to do: shapes and raw pointers, for the CPU and for CUDA alike.
#pragma once

#include <cstdint>

#include "core/bn_math.h"
#include "core/dtype.h"

namespace fastres {

// A dense activation tensor seen as batch x channels x pixels. Channels last: memory is
// [batch*pixels][channels]. Contiguous: memory is [batch][channels][pixels].
struct Activation {
    int64_t batch, channels, pixels;
    bool channels_last;
    Dtype dtype;

    constexpr int64_t rows() const { return batch * pixels; }  // elements a channel, M
    constexpr int64_t numel() const { return batch * channels * pixels; }
    constexpr int64_t bytes() const { return numel() * size_of(dtype); }
};

// A vector of one value a channel, in any dtype; null where the argument was None.
struct ChannelVector {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;

    explicit constexpr operator bool() const { return data != nullptr; }
};

// Which mean and variance a forward pass normalises by: those of the batch, which it takes and saves; the
// running ones, which it saves; or those that an earlier pass saved.
enum class Statistics : int { batch = 0, running = 1, saved = 2 };

// z = act((input - mean) * weight / sqrt(var + eps) + bias [+ residual])
struct BnForward {
    Activation shape;
    const void* input;
    const void* residual;  // null: no addition
    void* output;
    ChannelVector weight, bias;               // null: 1 and 0
    ChannelVector running_mean, running_var;  // read for Statistics::running, updated for ::batch or null
    void* save_mean;                          // [channels], double on the CPU, float on CUDA
    void* save_rstd;                          // [channels], the same
    Statistics statistics;
    const bn_math::Moments<double>* moments;  // [channels], those of the batch where they are known
    bool relu;
    double momentum, eps;
};

// The gradient of BnForward. g = grad * [z > 0]; grad_residual = g; grad_input from g and input.
struct BnBackward {
    Activation shape;
    const void* grad;
    const void* input;
    const void*
        output;  // z, for the mask where a residual was added; null: the mask is recomputed from input
    ChannelVector weight, bias;
    const void* save_mean;
    const void* save_rstd;
    void* grad_input;
    void* grad_residual;  // null where no residual was added, or where it equals grad
    void* grad_weight;    // [channels], accumulation dtype
    void* grad_bias;      // [channels], accumulation dtype
    bool training;
    bool relu;
};

// Element-wise over dense tensors of one layout: output = relu(input + other), and grad * [output > 0].
struct AddRelu {
    int64_t numel;
    Dtype dtype;
    const void* input;
    const void* other;
    void* output;
};
struct AddReluBackward {
    int64_t numel;
    Dtype dtype;
    const void* grad;
    const void* output;
    void* grad_input;
};

}  // namespace fastres
