// fastres::conv_bn_act_eval and conv_pack_weight: 2-d convolutions of channels-last tensors on the CPU with
// the batch norm, residual and activation behind them, by running statistics and without a gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/conv_arguments.h"
#include "bindings/device.h"
#include "bindings/max_pool.h"
#include "bindings/tensor.h"
#include "cpu/batch_norm.h"
#include "cpu/conv_max_pool.h"
#include "cpu/convolution.h"

namespace fastres::bindings {
namespace {

// The weight for conv_bn_act_eval of inputs of `like`'s dtype and of any size.
Tensor pack_weight(Tensor weight, Tensor like, Ints stride, Ints dilation, int64_t groups) {
    constexpr const char* op = "conv_pack_weight";
    cpu::ConvForward args{};
    args.weight = conv_weight(op, weight);
    const Ints smallest = {1, groups * weight.size(1),
                           axes(op, "dilation", dilation, 1).h * weight.size(2) + 1,
                           dilation[1] * weight.size(3) + 1};
    args.dtype = dtype_of(op, "like", like);
    args.shape = conv2d(op, smallest, args.dtype, weight, stride, {0, 0}, dilation);
    Tensor packed = empty_packed(weight, args);
    cpu::pack_weight(args, const_cast<float*>(packed_data(op, packed, args)), torch_threads());
    return packed;
}

// Output size, kernel size, stride and padding, two integers each, as one argument.
MaxPool2d pool_of(const char* op, const Ints& pool, const Conv2d& shape) {
    if (pool.size() != 8) fail(op, "pool takes eight integers, or none");
    const auto two = [&](int64_t i) { return Ints{pool[2 * i], pool[2 * i + 1]}; };
    return max_pool2d(op, shape.batch, shape.out, two(0), two(1), two(2), two(3));
}

// act(batch_norm(conv2d(input, conv_weight, conv_bias)) [+ residual]) by the running statistics, or the
// maximum over windows of that.
Tensor bn_act_eval(Tensor input, Tensor conv_weight_tensor, OptionalTensor packed, OptionalTensor conv_bias,
                   OptionalTensor residual, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                   OptionalTensor bias, Ints stride, Ints padding, Ints dilation, double eps, bool relu,
                   std::optional<Ints> pool) {
    constexpr const char* op = "conv_bn_act_eval";
    cpu::ConvForward args =
        conv_forward(op, input, conv_weight_tensor, residual, stride, padding, dilation);
    if (packed) args.packed = packed_data(op, *packed, args);
    const cpu::Affine affine = running_affine(op, conv_bias, running_mean, running_var, weight, bias, input,
                                              args.shape.out_channels, eps);
    args.scale = affine.scale.data();
    args.shift = affine.shift.data();
    args.relu = relu;
    if (pool) {
        if (residual) fail(op, "there is no kernel for a residual before a maximum over windows");
        const MaxPool2d windows = pool_of(op, *pool, args.shape);
        Tensor output = empty_channels_last(
            input, {args.shape.batch, args.shape.out_channels, windows.out.h, windows.out.w});
        cpu::conv_max_pool({args, windows, output.data_ptr()}, torch_threads());
        return output;
    }
    Tensor output = empty_channels_last(input, out_sizes(args.shape));
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.output = output.data_ptr();
    cpu::conv_forward(args, torch_threads());
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "conv_pack_weight(Tensor weight, Tensor like, int[] stride, int[] dilation, int groups) -> Tensor");
    library.def(
        "conv_bn_act_eval(Tensor input, Tensor conv_weight, Tensor? packed, Tensor? conv_bias, "
        "Tensor? residual, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
        "int[] stride, int[] padding, int[] dilation, float eps, bool relu, int[]? pool=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("conv_pack_weight", TORCH_BOX(&pack_weight));
    library.impl("conv_bn_act_eval", TORCH_BOX(&bn_act_eval));
}

}  // namespace fastres::bindings
