// What all ops with a batch norm check of its tensors, and hand to its kernels.
#pragma once

#include "bindings/tensor.h"
#include "core/batch_norm.h"

namespace fastres::bindings {

// Of the arguments: shape, statistics, and where input, running statistics, weight and bias are.
BnForward bn_forward(const char* op, const Tensor& input, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& weight,
                     const OptionalTensor& bias, bool training);

// The same of the gradient, with the saved statistics, which are of dtype `statistics`.
BnBackward bn_backward(const char* op, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& save_mean, const Tensor& save_rstd,
                       bool training, Dtype statistics);

}  // namespace fastres::bindings
