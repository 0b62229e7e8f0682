// fastres::conv_* and conv_bn_act_*: 2-d convolutions of channels-last tensors on the CPU, alone and with
// the batch norm, residual and activation behind them, in training; in evaluation see conv_inference.cpp.
#include "cpu/convolution.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "bindings/conv_arguments.h"
#include "bindings/device.h"
#include "bindings/tensor.h"
#include "cpu/batch_norm.h"

namespace fastres::bindings {
namespace {

// Where the convolution's output is, seen as a batch norm's input.
Activation activation_of(const Conv2d& shape, Dtype dtype) {
    return {shape.batch, shape.out_channels, shape.out.h * shape.out.w, /*channels_last=*/true, dtype};
}

// act(batch_norm(tensor)), by coefficients that stay where they are.
cpu::ConvOperand activated(const Tensor& tensor, const cpu::BnCoefficients& by, bool relu) {
    return {tensor.data_ptr(),
            nullptr,
            {cpu::Prologue::activation, by.mean.data(), by.scale.data(), by.shift.data(), nullptr, nullptr,
             relu, cpu::Mask::none}};
}

// The gradient of batch_norm's input.
cpu::ConvOperand differentiated(const Tensor& input, const cpu::BnInputGrad& grad) {
    const cpu::BnCoefficients& by = grad.by;
    return {grad.grad,
            input.data_ptr(),
            {cpu::Prologue::gradient, by.mean.data(), by.scale.data(), by.shift.data(), by.mean_grad.data(),
             by.slope.data(), false, grad.mask}};
}

// act(conv2d(input, weight, bias) [+ residual])
Tensor forward(Tensor input, Tensor weight, OptionalTensor bias, OptionalTensor residual, Ints stride,
               Ints padding, Ints dilation, bool relu) {
    constexpr const char* op = "conv_forward";
    cpu::ConvForward args = conv_forward(op, input, weight, residual, stride, padding, dilation);
    if (bias) {
        if (!bias->is_cpu() || bias->dim() != 1 || bias->size(0) != args.shape.out_channels ||
            !bias->is_contiguous() || dtype_of(op, "bias", *bias) != Dtype::f32)
            fail(op, "bias takes one float32 for each output channel");
        check_memory(op, "bias", *bias);
        args.shift = static_cast<const float*>(bias->data_ptr());
    }
    Tensor output = empty_channels_last(input, out_sizes(args.shape));
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.relu = relu;
    args.output = output.data_ptr();
    cpu::conv_forward(args, torch_threads());
    return output;
}

Tensor backward_input(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding,
                      Ints dilation) {
    constexpr const char* op = "conv_backward_input";
    cpu::ConvBackwardInput args{};
    args.weight = conv_weight(op, weight);
    args.dtype = dtype_of(op, "grad", grad);
    args.shape = conv2d(op, input_size, args.dtype, weight, stride, padding, dilation);
    check_operand(op, "grad", grad, out_sizes(args.shape), args.dtype);
    Tensor grad_input = empty_channels_last(grad, in_sizes(args.shape));
    args.grad = plain(grad);
    args.grad_input = grad_input.data_ptr();
    cpu::conv_backward_input(args, torch_threads());
    return grad_input;
}

Tensor backward_weight(Tensor grad, Tensor input, Tensor weight, Ints stride, Ints padding, Ints dilation) {
    constexpr const char* op = "conv_backward_weight";
    cpu::ConvBackwardWeight args{};
    args.dtype = dtype_of(op, "grad", grad);
    args.shape = conv2d(op, sizes_of(input), args.dtype, weight, stride, padding, dilation);
    check_operand(op, "grad", grad, out_sizes(args.shape), args.dtype);
    check_operand(op, "input", input, in_sizes(args.shape), args.dtype);
    Tensor grad_weight = output_like(weight);
    args.grad = plain(grad);
    args.input = plain(input);
    args.grad_weight = conv_weight(op, grad_weight);
    cpu::conv_backward_weight(args, torch_threads());
    return grad_weight;
}

// act(batch_norm(conv2d(input, conv_weight)) [+ residual]) in training, and what its gradient needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_forward(
    Tensor input, Tensor conv_weight_tensor, OptionalTensor residual, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias, Ints stride, Ints padding,
    Ints dilation, double momentum, double eps, bool relu) {
    constexpr const char* op = "conv_bn_act_forward";
    cpu::ConvForward conv =
        conv_forward(op, input, conv_weight_tensor, residual, stride, padding, dilation);
    Tensor conv_output = empty_channels_last(input, out_sizes(conv.shape));
    BnForward norm{};
    norm.shape = activation_of(conv.shape, conv.dtype);
    norm.running_mean = channel_vector(op, "running_mean", running_mean, conv_output);
    norm.running_var = channel_vector(op, "running_var", running_var, conv_output);
    norm.weight = channel_vector(op, "weight", weight, conv_output);
    norm.bias = channel_vector(op, "bias", bias, conv_output);
    if (norm.shape.rows() == 1) fail(op, "expected more than 1 value per channel when training");

    std::vector<bn_math::Moments<double>> moments(norm.shape.channels);
    conv.output = conv_output.data_ptr();
    conv.moments = cpu::takes_moments(norm.shape) ? moments.data() : nullptr;
    cpu::conv_forward(conv, torch_threads());

    Tensor output = output_like(conv_output);
    Tensor save_mean = empty_channels(conv_output, Dtype::f64);
    Tensor save_rstd = empty_channels(conv_output, Dtype::f64);
    norm.input = conv_output.data_ptr();
    norm.residual = residual ? residual->data_ptr() : nullptr;
    norm.output = output.data_ptr();
    norm.save_mean = save_mean.data_ptr();
    norm.save_rstd = save_rstd.data_ptr();
    norm.statistics = Statistics::batch;
    norm.moments = conv.moments;
    norm.relu = relu;
    norm.momentum = momentum;
    norm.eps = eps;
    cpu::batch_norm(norm, torch_threads());
    return {output, conv_output, save_mean, save_rstd};
}

// `output` is given where a residual was added, as for bn_act_backward. Where `input_mean` is given, the
// convolution's input was act(batch_norm(input)) by the statistics and parameters beginning with input_.
// Where `add_to` is given, the gradient of the input is added to it, and is nothing itself.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    Tensor grad, Tensor conv_output, OptionalTensor output, OptionalTensor weight, OptionalTensor bias,
    Tensor save_mean, Tensor save_rstd, bool relu, Tensor input, OptionalTensor input_weight,
    OptionalTensor input_bias, OptionalTensor input_mean, OptionalTensor input_rstd, bool input_relu,
    Tensor conv_weight_tensor, Ints stride, Ints padding, Ints dilation, OptionalTensor add_to,
    bool needs_input, bool needs_conv_weight) {
    constexpr const char* op = "conv_bn_act_backward";
    const Dtype dtype = dtype_of(op, "conv_output", conv_output);
    const Conv2d shape = conv2d(op, sizes_of(input), dtype, conv_weight_tensor, stride, padding, dilation);
    check_operand(op, "conv_output", conv_output, out_sizes(shape), dtype);
    check_operand(op, "grad", grad, out_sizes(shape), dtype);
    check_operand(op, "input", input, in_sizes(shape), dtype);
    if (output) check_operand(op, "output", *output, out_sizes(shape), dtype);
    if (output && !relu) fail(op, "output is given without relu, which needs no mask");
    if (add_to) check_operand(op, "add_to", *add_to, in_sizes(shape), dtype);
    if (add_to && !needs_input) fail(op, "add_to is given without needs_input");
    if (input_mean.has_value() != input_rstd.has_value())
        fail(op, "input_mean and input_rstd are given together or not at all");
    BnBackward norm{};
    norm.shape = activation_of(shape, dtype);
    norm.weight = channel_vector(op, "weight", weight, conv_output);
    norm.bias = channel_vector(op, "bias", bias, conv_output);
    const ChannelVector before_weight = channel_vector(op, "input_weight", input_weight, input);
    const ChannelVector before_bias = channel_vector(op, "input_bias", input_bias, input);
    check_statistics(op, "save_mean", save_mean, conv_output, Dtype::f64);
    check_statistics(op, "save_rstd", save_rstd, conv_output, Dtype::f64);
    if (input_mean) {
        check_statistics(op, "input_mean", *input_mean, input, Dtype::f64);
        check_statistics(op, "input_rstd", *input_rstd, input, Dtype::f64);
    }
    Tensor grad_residual = output ? output_like(conv_output) : nothing(conv_output);
    Tensor grad_weight = empty_channels(conv_output, accumulation_dtype(dtype));
    Tensor grad_bias = empty_channels(conv_output, accumulation_dtype(dtype));
    norm.grad = grad.data_ptr();
    norm.input = conv_output.data_ptr();
    norm.output = output ? output->data_ptr() : nullptr;
    norm.save_mean = save_mean.data_ptr();
    norm.save_rstd = save_rstd.data_ptr();
    norm.grad_residual = output ? grad_residual.data_ptr() : nullptr;
    norm.grad_weight = grad_weight.data_ptr();
    norm.grad_bias = grad_bias.data_ptr();
    norm.training = true;
    norm.relu = relu;
    const cpu::BnInputGrad input_grad = cpu::batch_norm_backward_sums(norm, torch_threads());

    // The gradient of the convolution's output is never written: both convolutions make it as they load.
    const cpu::ConvOperand grad_operand = differentiated(conv_output, input_grad);
    Tensor grad_input =
        needs_input && !add_to ? empty_channels_last(conv_output, in_sizes(shape)) : nothing(conv_output);
    const cpu::ConvBackwardInput for_input{shape,
                                           dtype,
                                           grad_operand,
                                           conv_weight(op, conv_weight_tensor),
                                           add_to ? add_to->data_ptr() : grad_input.data_ptr(),
                                           add_to.has_value()};
    Tensor grad_conv_weight = needs_conv_weight ? output_like(conv_weight_tensor) : nothing(conv_output);
    cpu::BnCoefficients before;
    cpu::ConvBackwardWeight for_weight{
        shape, dtype, grad_operand, plain(input),
        needs_conv_weight ? conv_weight(op, grad_conv_weight) : ConvWeight{}};
    if (input_mean && needs_conv_weight) {
        before = cpu::forward_coefficients(shape.in_channels, before_weight, before_bias,
                                           static_cast<const double*>(input_mean->data_ptr()),
                                           static_cast<const double*>(input_rstd->data_ptr()));
        for_weight.input = activated(input, before, input_relu);
    }
    if (needs_input && needs_conv_weight)
        cpu::conv_backward(for_input, for_weight, torch_threads());
    else if (needs_input)
        cpu::conv_backward_input(for_input, torch_threads());
    else if (needs_conv_weight)
        cpu::conv_backward_weight(for_weight, torch_threads());
    return {grad_input, grad_conv_weight, grad_residual, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "conv_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
        "int[] padding, int[] dilation, bool relu) -> Tensor");
    library.def(
        "conv_backward_input(Tensor grad, Tensor weight, int[] input_size, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
    library.def(
        "conv_bn_act_forward(Tensor input, Tensor conv_weight, Tensor? residual, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor? weight, Tensor? bias, int[] stride, int[] padding, "
        "int[] dilation, float momentum, float eps, bool relu) "
        "-> (Tensor output, Tensor conv_output, Tensor save_mean, Tensor save_rstd)");
    library.def(
        "conv_bn_act_backward(Tensor grad, Tensor conv_output, Tensor? output, Tensor? weight, "
        "Tensor? bias, Tensor save_mean, Tensor save_rstd, bool relu, Tensor input, Tensor? input_weight, "
        "Tensor? input_bias, Tensor? input_mean, Tensor? input_rstd, bool input_relu, Tensor conv_weight, "
        "int[] stride, int[] padding, int[] dilation, Tensor(a!)? add_to, bool needs_input, "
        "bool needs_conv_weight) "
        "-> (Tensor grad_input, Tensor grad_conv_weight, Tensor grad_residual, Tensor grad_weight, "
        "Tensor grad_bias)");
    library.def(
        "conv_backward_weight(Tensor grad, Tensor input, Tensor weight, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("conv_forward", TORCH_BOX(&forward));
    library.impl("conv_backward_input", TORCH_BOX(&backward_input));
    library.impl("conv_backward_weight", TORCH_BOX(&backward_weight));
    library.impl("conv_bn_act_forward", TORCH_BOX(&bn_act_forward));
    library.impl("conv_bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace fastres::bindings
