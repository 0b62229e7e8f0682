// fastres::bn_relu_max_pool_forward and _backward: max_pool2d(relu(batch_norm(input))) of channels-last
// images.
#include "cpu/max_pool.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/batch_norm.h"
#include "bindings/device.h"
#include "bindings/max_pool.h"
#include "bindings/tensor.h"
#if defined(FASTRES_CUDA)
#include "cuda/batch_norm.h"
#include "cuda/max_pool.h"
#endif

namespace fastres::bindings {
namespace {

void check_axis(const char* op, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding) {
    if (2 * padding > kernel) fail(op, "padding is more than half of the kernel");
    if ((out - 1) * stride - padding >= in) fail(op, "output_size has windows outside of the image");
}

}  // namespace

MaxPool2d max_pool2d(const char* op, int64_t batch, Axes in, const Ints& output_size, const Ints& kernel,
                     const Ints& stride, const Ints& padding) {
    MaxPool2d pool{};
    pool.batch = batch;
    pool.in = in;
    pool.out = axes(op, "output_size", output_size, 1);
    pool.kernel = axes(op, "kernel_size", kernel, 1);
    pool.stride = axes(op, "stride", stride, 1);
    pool.padding = axes(op, "padding", padding, 0);
    if (pool.kernel.h * pool.kernel.w > MaxPool2d::most_taps)
        fail(op, "kernel_size has more than " + std::to_string(MaxPool2d::most_taps) + " pixels");
    check_axis(op, pool.in.h, pool.out.h, pool.kernel.h, pool.stride.h, pool.padding.h);
    check_axis(op, pool.in.w, pool.out.w, pool.kernel.w, pool.stride.w, pool.padding.w);
    return pool;
}

namespace {

constexpr const char* kForward = "bn_relu_max_pool_forward";
constexpr const char* kBackward = "bn_relu_max_pool_backward";

struct OnCpu {
    static constexpr Dtype statistics = Dtype::f64;
    static void run(const BnMaxPoolForward& args, const Tensor&) {
        cpu::bn_max_pool(args, torch_threads());
    }
    static void run(const BnMaxPoolBackward& args, const Tensor&) {
        cpu::bn_max_pool_backward(args, torch_threads());
    }
};

#if defined(FASTRES_CUDA)
struct OnCuda {
    static constexpr Dtype statistics = Dtype::f32;
    static void run(const BnMaxPoolForward& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        const Tensor workspace = empty_bytes(input, cuda::batch_norm_workspace_bytes(args.norm.shape));
        cuda::bn_max_pool(args, workspace.data_ptr(), current_stream(input));
    }
    static void run(const BnMaxPoolBackward& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        const Tensor workspace = empty_bytes(input, cuda::batch_norm_workspace_bytes(args.norm.shape));
        cuda::bn_max_pool_backward(args, workspace.data_ptr(), current_stream(input));
    }
};
#endif

MaxPool2d max_pool2d(const char* op, const Tensor& input, const Ints& output_size, const Ints& kernel,
                     const Ints& stride, const Ints& padding) {
    if (input.dim() != 4 || !is_channels_last(input)) fail(op, "input is not a 4-d channels-last tensor");
    return bindings::max_pool2d(op, input.size(0), {input.size(2), input.size(3)}, output_size, kernel,
                                stride, padding);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor input, OptionalTensor running_mean,
                                                   OptionalTensor running_var, OptionalTensor weight,
                                                   OptionalTensor bias, bool training, double momentum,
                                                   double eps, Ints output_size, Ints kernel, Ints stride,
                                                   Ints padding) {
    BnMaxPoolForward args{};
    args.pool = max_pool2d(kForward, input, output_size, kernel, stride, padding);
    args.norm = bn_forward(kForward, input, running_mean, running_var, weight, bias, training);
    const Ints size = {input.size(0), input.size(1), args.pool.out.h, args.pool.out.w};
    Tensor output = empty_channels_last(input, size);
    Tensor index = empty_bytes(input, output.numel());
    Tensor save_mean = empty_channels(input, Device::statistics);
    Tensor save_rstd = empty_channels(input, Device::statistics);
    args.norm.save_mean = save_mean.data_ptr();
    args.norm.save_rstd = save_rstd.data_ptr();
    args.norm.relu = true;
    args.norm.momentum = momentum;
    args.norm.eps = eps;
    args.output = output.data_ptr();
    args.index = static_cast<uint8_t*>(index.data_ptr());
    Device::run(args, input);
    return {output, index, save_mean, save_rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor input, Tensor index, OptionalTensor weight,
                                            OptionalTensor bias, Tensor save_mean, Tensor save_rstd,
                                            bool training, Ints kernel, Ints stride, Ints padding) {
    BnMaxPoolBackward args{};
    if (grad.dim() != 4 || grad.size(0) != input.size(0) || grad.size(1) != input.size(1) ||
        !same_device(grad, input) || !is_channels_last(grad) ||
        dtype_of(kBackward, "grad", grad) != dtype_of(kBackward, "input", input))
        fail(kBackward, "grad is not a channels-last tensor with input's images, channels and dtype");
    check_memory(kBackward, "grad", grad);
    if (index.numel() != grad.numel() || index.element_size() != 1 || !index.is_contiguous() ||
        !same_device(index, input))
        fail(kBackward, "index is not what bn_relu_max_pool_forward gave");
    check_memory(kBackward, "index", index);
    args.pool = max_pool2d(kBackward, input, {grad.size(2), grad.size(3)}, kernel, stride, padding);
    args.norm =
        bn_backward(kBackward, input, weight, bias, save_mean, save_rstd, training, Device::statistics);
    Tensor grad_input = output_like(input);
    Tensor grad_weight = empty_channels(input, accumulation_dtype(args.norm.shape.dtype));
    Tensor grad_bias = empty_channels(input, accumulation_dtype(args.norm.shape.dtype));
    args.norm.grad_input = grad_input.data_ptr();
    args.norm.grad_weight = grad_weight.data_ptr();
    args.norm.grad_bias = grad_bias.data_ptr();
    args.norm.relu = true;
    args.grad = grad.data_ptr();
    args.index = static_cast<const uint8_t*>(index.data_ptr());
    Device::run(args, input);
    return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "bn_relu_max_pool_forward(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? weight, Tensor? bias, bool training, float momentum, float eps, int[] output_size, "
        "int[] kernel_size, int[] stride, int[] padding) "
        "-> (Tensor output, Tensor index, Tensor save_mean, Tensor save_rstd)");
    library.def(
        "bn_relu_max_pool_backward(Tensor grad, Tensor input, Tensor index, Tensor? weight, Tensor? bias, "
        "Tensor save_mean, Tensor save_rstd, bool training, int[] kernel_size, int[] stride, int[] "
        "padding) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("bn_relu_max_pool_forward", TORCH_BOX(&forward<OnCpu>));
    library.impl("bn_relu_max_pool_backward", TORCH_BOX(&backward<OnCpu>));
}

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, library) {
    library.impl("bn_relu_max_pool_forward", TORCH_BOX(&forward<OnCuda>));
    library.impl("bn_relu_max_pool_backward", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace fastres::bindings
