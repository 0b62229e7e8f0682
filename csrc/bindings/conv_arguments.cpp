#include "bindings/conv_arguments.h"

#include <cstring>
#include <string>

#include "bindings/device.h"
#include "cpu/conv_groups.h"
#include "cpu/isa.h"

namespace fastres::bindings {
namespace {

void check_kernels(const char* op, Dtype dtype) {
    if (!cpu::convolution_kernels(dtype))
        fail(op,
             "no kernel for " + std::string(name(dtype)) + " with instruction set " + cpu::kernels().isa);
}

int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

struct PackedHeader {
    static constexpr int64_t floats = 16;  // a cache line

    int32_t block, pack, groups;

    explicit PackedHeader(const cpu::ConvForward& args)
        : PackedHeader(cpu::fitting(*cpu::convolution_kernels(args.dtype), args.shape.out_channels),
                       args.shape.groups) {}

  private:
    PackedHeader(const cpu::ConvKernels& kernels, int64_t groups)
        : block(kernels.block), pack(kernels.pack), groups(static_cast<int32_t>(groups)) {}
};

int64_t packed_bytes(const cpu::ConvForward& args) {
    return (PackedHeader::floats + cpu::packed_floats(args, torch_threads())) * int64_t{sizeof(float)};
}

}  // namespace

ConvWeight conv_weight(const char* op, const Tensor& weight) {
    if (weight.dim() != 4 || !weight.is_cpu()) fail(op, "weight is not a 4-d tensor on the CPU");
    const Dtype dtype = dtype_of(op, "weight", weight);
    if (dtype == Dtype::f64) fail(op, "weight is float64; takes float32, bfloat16 or float16");
    check_memory(op, "weight", weight);
    return {weight.data_ptr(), dtype,           weight.stride(0), weight.stride(1),
            weight.stride(2),  weight.stride(3)};
}

void check_operand(const char* op, const char* argument, const Tensor& tensor, const Ints& size,
                   Dtype dtype) {
    if (tensor.dim() != 4 || !tensor.is_cpu())
        fail(op, std::string(argument) + " is not a 4-d tensor on the CPU");
    for (int64_t i = 0; i < 4; ++i)
        if (tensor.size(i) != size[i])
            fail(op, std::string(argument) + " has another shape than the convolution gives it");
    if (!is_channels_last(tensor)) fail(op, std::string(argument) + " is not channels last");
    if (dtype_of(op, argument, tensor) != dtype)
        fail(op, std::string(argument) + " is not of dtype " + name(dtype));
    check_memory(op, argument, tensor);
}

Conv2d conv2d(const char* op, const Ints& input, Dtype dtype, const Tensor& weight, const Ints& stride,
              const Ints& padding, const Ints& dilation) {
    if (input.size() != 4) fail(op, "input is not 4-d");
    Conv2d shape{};
    shape.batch = input[0];
    shape.in_channels = input[1];
    shape.in = {input[2], input[3]};
    shape.out_channels = weight.size(0);
    shape.kernel = {weight.size(2), weight.size(3)};
    shape.stride = axes(op, "stride", stride, 1);
    shape.padding = axes(op, "padding", padding, 0);
    shape.dilation = axes(op, "dilation", dilation, 1);
    // Whoever counts channels in a group has said how many groups there are.
    const int64_t of_group = weight.size(1);
    if (of_group < 1 || shape.in_channels < 1 || shape.in_channels % of_group != 0)
        fail(op, "weight takes " + std::to_string(of_group) + " input channels, input has " +
                     std::to_string(shape.in_channels));
    shape.groups = shape.in_channels / of_group;
    if (shape.kernel.h < 1 || shape.kernel.w < 1) fail(op, "the kernel has no pixels");
    check_kernels(op, dtype);
    if (!cpu::covers_groups(*cpu::convolution_kernels(dtype), shape.in_channels, shape.out_channels,
                            shape.groups))
        fail(op, "no kernel for " + std::to_string(shape.groups) + " groups of " +
                     std::to_string(of_group) + " input channels and " +
                     std::to_string(shape.out_channels) + " output channels in all");
    shape.out = {out_size(shape.in.h, shape.kernel.h, shape.stride.h, shape.padding.h, shape.dilation.h),
                 out_size(shape.in.w, shape.kernel.w, shape.stride.w, shape.padding.w, shape.dilation.w)};
    if (shape.out.h < 1 || shape.out.w < 1) fail(op, "the kernel is larger than the padded input");
    return shape;
}

Ints out_sizes(const Conv2d& shape) {
    return {shape.batch, shape.out_channels, shape.out.h, shape.out.w};
}
Ints in_sizes(const Conv2d& shape) {
    return {shape.batch, shape.in_channels, shape.in.h, shape.in.w};
}

Ints sizes_of(const Tensor& tensor) {
    return {tensor.sizes().begin(), tensor.sizes().end()};
}

cpu::ConvForward conv_forward(const char* op, const Ints& input, Dtype dtype, const Tensor& weight,
                              const Ints& stride, const Ints& padding, const Ints& dilation) {
    cpu::ConvForward args{};
    args.weight = conv_weight(op, weight);
    args.dtype = dtype;
    args.shape = conv2d(op, input, dtype, weight, stride, padding, dilation);
    return args;
}

cpu::ConvForward conv_forward(const char* op, const Tensor& input, const Tensor& weight,
                              const OptionalTensor& residual, const Ints& stride, const Ints& padding,
                              const Ints& dilation) {
    const Dtype dtype = dtype_of(op, "input", input);
    cpu::ConvForward args = conv_forward(op, sizes_of(input), dtype, weight, stride, padding, dilation);
    check_operand(op, "input", input, in_sizes(args.shape), dtype);
    if (residual) check_operand(op, "residual", *residual, out_sizes(args.shape), dtype);
    args.input = plain(input);
    return args;
}

Tensor empty_packed(const Tensor& like, const cpu::ConvForward& args) {
    Tensor packed = empty_bytes(like, packed_bytes(args));
    const PackedHeader header(args);
    std::memset(packed.data_ptr(), 0, PackedHeader::floats * sizeof(float));
    std::memcpy(packed.data_ptr(), &header, sizeof header);
    return packed;
}

const float* packed_data(const char* op, const Tensor& packed, const cpu::ConvForward& args) {
    const PackedHeader expected(args);
    check_memory(op, "packed", packed);
    if (packed.dim() != 1 || packed.numel() != packed_bytes(args) || !packed.is_contiguous() ||
        !packed.is_cpu() || packed.element_size() != 1 ||
        std::memcmp(packed.data_ptr(), &expected, sizeof expected) != 0)
        fail(op,
             "packed is not what conv_pack_weight makes of this weight with the instruction set in use");
    return static_cast<const float*>(packed.data_ptr()) + PackedHeader::floats;
}

cpu::Affine running_affine(const char* op, const OptionalTensor& conv_bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& like,
                           int64_t channels, double eps) {
    return cpu::affine(channels, channel_vector(op, "conv_bias", conv_bias, like, channels),
                       channel_vector(op, "running_mean", running_mean, like, channels),
                       channel_vector(op, "running_var", running_var, like, channels),
                       channel_vector(op, "weight", weight, like, channels),
                       channel_vector(op, "bias", bias, like, channels), eps);
}

}  // namespace fastres::bindings
