// Fused batch normalisation on the CPU: splits the work between threads, merges their statistics.
//
// Channels last: the rows are split, statistics are merged in the order of the tasks. Contiguous: the
// channels are split, and a channel's second pass finds it in the cache. Results depend on the number of
// threads, never on their timing.
#pragma once

#include "core/batch_norm.h"
#include "cpu/aligned_vector.h"
#include "cpu/mask.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

void batch_norm(const BnForward& args, const ThreadPool& pool);
void batch_norm_backward(const BnBackward& args, const ThreadPool& pool);

// Whether BnForward::moments may be sums in float, as the convolutions take them: their errors do not
// average out in fewer values.
bool takes_moments(const Activation& shape);

// A batch norm's coefficients, one a channel, as the convolutions' loads take them (cpu/conv_kernels.h).
struct BnCoefficients {
    AlignedVector<float> mean, scale, shift;  // of the forward map
    AlignedVector<float> mean_grad, slope;    // of the input's gradient
};

// z = y * scale + shift, one entry a channel.
struct Affine {
    AlignedVector<float> scale, shift;
};

// Batch norm of y + input_bias by running statistics.
Affine affine(int64_t channels, const ChannelVector& input_bias, const ChannelVector& running_mean,
              const ChannelVector& running_var, const ChannelVector& weight, const ChannelVector& bias,
              double eps);

// Those of the forward map by saved statistics.
BnCoefficients forward_coefficients(int64_t channels, const ChannelVector& weight,
                                    const ChannelVector& bias, const double* save_mean,
                                    const double* save_rstd);

// What is left of batch_norm_backward after its sums: grad_input from the gradient at `grad`, after `mask`.
struct BnInputGrad {
    const void* grad;
    Mask mask;
    BnCoefficients by;
};

// batch_norm_backward in training, but for grad_input. Channels last.
BnInputGrad batch_norm_backward_sums(const BnBackward& args, const ThreadPool& pool);

void add_relu(const AddRelu& args, const ThreadPool& pool);
void add_relu_backward(const AddReluBackward& args, const ThreadPool& pool);

}  // namespace fastres::cpu
