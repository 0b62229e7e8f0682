// The names under which kernels are launched, listed and reported.
#pragma once

#include <string>
#include <vector>

namespace fastres::cuda {
namespace kernel {

inline constexpr const char* kMoments = "batch_norm_moments";
inline constexpr const char* kStatistics = "batch_norm_statistics";
inline constexpr const char* kApply = "batch_norm_apply";
inline constexpr const char* kReduce = "batch_norm_reduce";
inline constexpr const char* kParameterGrad = "batch_norm_parameter_grad";
inline constexpr const char* kInputGrad = "batch_norm_input_grad";
inline constexpr const char* kForwardOnChip = "batch_norm_forward_on_chip";
inline constexpr const char* kBackwardOnChip = "batch_norm_backward_on_chip";
inline constexpr const char* kApplyMaxPool = "batch_norm_apply_max_pool";
inline constexpr const char* kAddRelu = "add_relu";
inline constexpr const char* kAddReluBackward = "add_relu_backward";

}  // namespace kernel

inline std::vector<std::string> kernel_names() {
    return {kernel::kMoments,       kernel::kStatistics, kernel::kApply,          kernel::kReduce,
            kernel::kParameterGrad, kernel::kInputGrad,  kernel::kForwardOnChip,  kernel::kBackwardOnChip,
            kernel::kApplyMaxPool,  kernel::kAddRelu,    kernel::kAddReluBackward};
}

}  // namespace fastres::cuda
