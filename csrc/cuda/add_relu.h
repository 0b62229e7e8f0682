// The residual addition with its ReLU, and its gradient, on CUDA; in one pass each.
#pragma once

#include "core/batch_norm.h"
#include "cuda/stream.h"

namespace fastres::cuda {

// Throw std::invalid_argument for float64, std::runtime_error where the launch fails. args.output may be
// one of the inputs, and args.grad_input may be args.grad.
void add_relu(const AddRelu& args, Stream stream);
void add_relu_backward(const AddReluBackward& args, Stream stream);

}  // namespace fastres::cuda
