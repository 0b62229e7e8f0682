// Two-dimensional convolutions of channels-last activations, together with the batch norm before and behind
// them.
#pragma once

#include "core/bn_math.h"
#include "core/conv2d.h"
#include "cpu/conv_kernels.h"
#include "cpu/cut.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

// An activation or its gradient, as it is or as a batch norm makes it, value by value, when it is loaded.
struct ConvOperand {
    const void* data;
    const void* bn_input;  // for Prologue::gradient
    PrologueCoefficients prologue;
};

struct ConvForward {
    Conv2d shape;
    Dtype dtype;  // of input, residual and output
    ConvOperand input;
    ConvWeight weight;
    const float* packed;         // weight as pack_weight left it; null: it is packed for this call
    const float *scale, *shift;  // output = act(sums * scale + shift + residual): [out_channels], or null
    const void* residual;        // like output, or null
    bool relu;
    void* output;
    bn_math::Moments<double>* moments;  // [out_channels], of the output over all pixels; or null
};

struct ConvBackwardInput {
    Conv2d shape;
    Dtype dtype;
    ConvOperand grad;
    ConvWeight weight;
    void* grad_input;
    bool add;  // to what is there
};

struct ConvBackwardWeight {
    Conv2d shape;
    Dtype dtype;
    ConvOperand grad, input;
    ConvWeight grad_weight;
};

void conv_forward(const ConvForward& args, const ThreadPool& pool);

// Some rows of the output of one image, by the calling thread, for plain inputs and packed weights;
// `output` is where the first of them goes.
void conv_forward_rows(const ConvForward& args, int64_t image, Range rows, void* output);

// A weight in the order in which conv_forward multiplies it, which is one for inputs of all sizes: so many
// floats. Of `args`, neither pixels nor pointers to other tensors count.
int64_t packed_floats(const ConvForward& args, const ThreadPool& pool);
void pack_weight(const ConvForward& args, float* packed, const ThreadPool& pool);

void conv_backward_input(const ConvBackwardInput& args, const ThreadPool& pool);
void conv_backward_weight(const ConvBackwardWeight& args, const ThreadPool& pool);
// Both, of the same gradient of the output, which is read but once where that can be.
void conv_backward(const ConvBackwardInput& input, const ConvBackwardWeight& weight,
                   const ThreadPool& pool);

}  // namespace fastres::cpu
