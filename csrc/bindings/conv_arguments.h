// What the ops of convolutions take, checked, as the kernels see it.
#pragma once

#include <cstdint>

#include "bindings/tensor.h"
#include "core/conv2d.h"
#include "cpu/batch_norm.h"
#include "cpu/convolution.h"

namespace fastres::bindings {

ConvWeight conv_weight(const char* op, const Tensor& weight);

// Of an input of this size, for kernels of `dtype`.
Conv2d conv2d(const char* op, const Ints& input, Dtype dtype, const Tensor& weight, const Ints& stride,
              const Ints& padding, const Ints& dilation);

Ints out_sizes(const Conv2d& shape);
Ints in_sizes(const Conv2d& shape);
Ints sizes_of(const Tensor& tensor);

// Checks that a tensor is a dense channels-last one of that size and dtype, on the CPU.
void check_operand(const char* op, const char* argument, const Tensor& tensor, const Ints& size,
                   Dtype dtype);

// Checks what goes into a convolution, and how it is asked for; of the first, only the size of the input.
cpu::ConvForward conv_forward(const char* op, const Ints& input, Dtype dtype, const Tensor& weight,
                              const Ints& stride, const Ints& padding, const Ints& dilation);
cpu::ConvForward conv_forward(const char* op, const Tensor& input, const Tensor& weight,
                              const OptionalTensor& residual, const Ints& stride, const Ints& padding,
                              const Ints& dilation);

// Of such a convolution's weight as conv_pack_weight leaves it, which begins with how it is packed: other
// instruction sets do it otherwise.
Tensor empty_packed(const Tensor& like, const cpu::ConvForward& args);
const float* packed_data(const char* op, const Tensor& packed, const cpu::ConvForward& args);

// batch_norm(sums + conv_bias) by the running statistics, as one product and sum, of activations like
// `like`.
cpu::Affine running_affine(const char* op, const OptionalTensor& conv_bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& like,
                           int64_t channels, double eps);

inline cpu::ConvOperand plain(const Tensor& tensor) {
    return {tensor.data_ptr(), nullptr, {}};
}

}  // namespace fastres::bindings
