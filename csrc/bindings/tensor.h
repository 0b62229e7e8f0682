// Torch tensors as the kernels see them: checks first, then shapes and raw pointers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "core/batch_norm.h"
#include "core/conv2d.h"

namespace fastres::bindings {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// Throws std::runtime_error("fastres::<op>: <message>").
[[noreturn]] void fail(const char* op, const std::string& message);

// Two integers, of at least `least`.
Axes axes(const char* op, const char* argument, const Ints& values, int64_t least);

Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor);

// Whether memory holds the channels of a pixel side by side, pixel after pixel, without gaps.
bool is_channels_last(const Tensor& tensor);

// (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), dense and non-empty, contiguous or channels last.
Activation activation(const char* op, const char* argument, const Tensor& tensor);

bool same_device(const Tensor& a, const Tensor& b);

// Checks that the storage of `tensor`, which may have been resized, has all of its values.
void check_memory(const char* op, const char* argument, const Tensor& tensor);

// Checks that `tensor` has the shape, dtype, device and memory layout of `input`.
void check_like_input(const char* op, const char* argument, const Tensor& tensor, const Tensor& input);

// One value a channel, dense, on input's device; null where None. A low-precision vector may accompany only
// an input of its own dtype, and float64 only float64, as in torch.nn.functional.batch_norm.
ChannelVector channel_vector(const char* op, const char* argument, const OptionalTensor& tensor,
                             const Tensor& input);
// The same of another tensor like input, of so many channels.
ChannelVector channel_vector(const char* op, const char* argument, const OptionalTensor& tensor,
                             const Tensor& input, int64_t channels);

// Checks that `tensor` holds one value of `dtype` a channel, dense, on input's device.
void check_statistics(const char* op, const char* argument, const Tensor& tensor, const Tensor& input,
                      Dtype dtype);

// An uninitialised tensor for results of input's size, and one of another size in channels-last order.
// Large ones on the CPU are of cpu::MemoryPool.
Tensor output_like(const Tensor& input);
Tensor empty_channels_last(const Tensor& like, const Ints& size);

// Whether they are, from now on; tells whether they were.
bool keep_memory(bool keep);

// Uninitialised one-dimensional tensors on input's device: of `count` values, accumulators, a workspace, a
// stand-in for "none".
Tensor empty_values(const Tensor& input, int64_t count, Dtype dtype);
Tensor empty_channels(const Tensor& input, Dtype dtype);
Tensor empty_bytes(const Tensor& input, int64_t bytes);
Tensor nothing(const Tensor& input);

}  // namespace fastres::bindings
