// fastres::bn_act_forward and fastres::bn_act_backward: act(batch_norm(input) [+ residual]) and its
// gradient.
#include "bindings/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/device.h"
#include "bindings/tensor.h"
#include "cpu/batch_norm.h"
#if defined(FASTRES_CUDA)
#include "cuda/batch_norm.h"
#endif

namespace fastres::bindings {
namespace {

constexpr const char* kForward = "bn_act_forward";
constexpr const char* kAgain = "bn_act_again";
constexpr const char* kBackward = "bn_act_backward";

struct OnCpu {
    static constexpr Dtype statistics = Dtype::f64;
    static void run(const BnForward& args, const Tensor&) { cpu::batch_norm(args, torch_threads()); }
    static void run(const BnBackward& args, const Tensor&) {
        cpu::batch_norm_backward(args, torch_threads());
    }
};

#if defined(FASTRES_CUDA)
struct OnCuda {
    static constexpr Dtype statistics = Dtype::f32;
    static void run(const BnForward& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        const Tensor workspace = empty_bytes(input, cuda::batch_norm_workspace_bytes(args.shape));
        cuda::batch_norm(args, workspace.data_ptr(), current_stream(input));
    }
    static void run(const BnBackward& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        const Tensor workspace = empty_bytes(input, cuda::batch_norm_workspace_bytes(args.shape));
        cuda::batch_norm_backward(args, workspace.data_ptr(), current_stream(input));
    }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(Tensor input, OptionalTensor residual,
                                           OptionalTensor running_mean, OptionalTensor running_var,
                                           OptionalTensor weight, OptionalTensor bias, bool training,
                                           double momentum, double eps, bool relu) {
    BnForward args = bn_forward(kForward, input, running_mean, running_var, weight, bias, training);
    if (residual) check_like_input(kForward, "residual", *residual, input);
    Tensor output = output_like(input);
    Tensor save_mean = empty_channels(input, Device::statistics);
    Tensor save_rstd = empty_channels(input, Device::statistics);
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.output = output.data_ptr();
    args.save_mean = save_mean.data_ptr();
    args.save_rstd = save_rstd.data_ptr();
    args.relu = relu;
    args.momentum = momentum;
    args.eps = eps;
    Device::run(args, input);
    return {output, save_mean, save_rstd};
}

// By the running statistics, which are not written: a compiler asks an op's schema for what it writes.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> eval(Tensor input, OptionalTensor residual, Tensor running_mean,
                                        Tensor running_var, OptionalTensor weight, OptionalTensor bias,
                                        double eps, bool relu) {
    return forward<Device>(input, residual, running_mean, running_var, weight, bias, /*training=*/false,
                           /*momentum=*/0.0, eps, relu);
}

// The output that a forward pass had, from what it saved.
template <class Device>
Tensor again(Tensor input, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
             Tensor save_mean, Tensor save_rstd, bool relu) {
    BnForward args{};
    args.shape = activation(kAgain, "input", input);
    if (residual) check_like_input(kAgain, "residual", *residual, input);
    args.weight = channel_vector(kAgain, "weight", weight, input);
    args.bias = channel_vector(kAgain, "bias", bias, input);
    check_statistics(kAgain, "save_mean", save_mean, input, Device::statistics);
    check_statistics(kAgain, "save_rstd", save_rstd, input, Device::statistics);
    Tensor output = output_like(input);
    args.input = input.data_ptr();
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.output = output.data_ptr();
    args.save_mean = save_mean.data_ptr();
    args.save_rstd = save_rstd.data_ptr();
    args.statistics = Statistics::saved;
    args.relu = relu;
    Device::run(args, input);
    return output;
}

// `output` is given where a residual was added, and only there: the mask cannot be recomputed from input
// then, and the masked gradient, which is the residual's, is written. Without `relu`, the residual's
// gradient is `grad`.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor input, OptionalTensor output,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    Tensor save_mean, Tensor save_rstd, bool training,
                                                    bool relu) {
    BnBackward args =
        bn_backward(kBackward, input, weight, bias, save_mean, save_rstd, training, Device::statistics);
    check_like_input(kBackward, "grad", grad, input);
    if (output) check_like_input(kBackward, "output", *output, input);
    if (output && !relu) fail(kBackward, "output is given without relu, which needs no mask");
    Tensor grad_input = output_like(input);
    Tensor grad_residual = output ? output_like(input) : nothing(input);
    Tensor grad_weight = empty_channels(input, accumulation_dtype(args.shape.dtype));
    Tensor grad_bias = empty_channels(input, accumulation_dtype(args.shape.dtype));
    args.grad = grad.data_ptr();
    args.output = output ? output->data_ptr() : nullptr;
    args.grad_input = grad_input.data_ptr();
    args.grad_residual = output ? grad_residual.data_ptr() : nullptr;
    args.grad_weight = grad_weight.data_ptr();
    args.grad_bias = grad_bias.data_ptr();
    args.relu = relu;
    Device::run(args, input);
    return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace

BnForward bn_forward(const char* op, const Tensor& input, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& weight,
                     const OptionalTensor& bias, bool training) {
    BnForward args{};
    args.shape = activation(op, "input", input);
    args.running_mean = channel_vector(op, "running_mean", running_mean, input);
    args.running_var = channel_vector(op, "running_var", running_var, input);
    args.weight = channel_vector(op, "weight", weight, input);
    args.bias = channel_vector(op, "bias", bias, input);
    if (training && args.shape.rows() == 1)
        fail(op, "expected more than 1 value per channel when training");
    if (!training && !(running_mean && running_var))
        fail(op, "expected running_mean and running_var to be defined when training=False");
    args.input = input.data_ptr();
    args.statistics = training ? Statistics::batch : Statistics::running;
    return args;
}

BnBackward bn_backward(const char* op, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& save_mean, const Tensor& save_rstd,
                       bool training, Dtype statistics) {
    BnBackward args{};
    args.shape = activation(op, "input", input);
    args.weight = channel_vector(op, "weight", weight, input);
    args.bias = channel_vector(op, "bias", bias, input);
    check_statistics(op, "save_mean", save_mean, input, statistics);
    check_statistics(op, "save_rstd", save_rstd, input, statistics);
    args.input = input.data_ptr();
    args.save_mean = save_mean.data_ptr();
    args.save_rstd = save_rstd.data_ptr();
    args.training = training;
    return args;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "bn_act_forward(Tensor input, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? weight, Tensor? bias, bool training, float momentum, float eps, bool relu) "
        "-> (Tensor output, Tensor save_mean, Tensor save_rstd)");
    library.def(
        "bn_act_eval(Tensor input, Tensor? residual, Tensor running_mean, Tensor running_var, "
        "Tensor? weight, Tensor? bias, float eps, bool relu) "
        "-> (Tensor output, Tensor save_mean, Tensor save_rstd)");
    library.def(
        "bn_act_again(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor save_mean, "
        "Tensor save_rstd, bool relu) -> Tensor");
    library.def(
        "bn_act_backward(Tensor grad, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, "
        "Tensor save_mean, Tensor save_rstd, bool training, bool relu) "
        "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("bn_act_forward", TORCH_BOX(&forward<OnCpu>));
    library.impl("bn_act_eval", TORCH_BOX(&eval<OnCpu>));
    library.impl("bn_act_again", TORCH_BOX(&again<OnCpu>));
    library.impl("bn_act_backward", TORCH_BOX(&backward<OnCpu>));
}

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, library) {
    library.impl("bn_act_forward", TORCH_BOX(&forward<OnCuda>));
    library.impl("bn_act_eval", TORCH_BOX(&eval<OnCuda>));
    library.impl("bn_act_again", TORCH_BOX(&again<OnCuda>));
    library.impl("bn_act_backward", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace fastres::bindings
