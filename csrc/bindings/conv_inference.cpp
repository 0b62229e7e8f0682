// fastres::conv_bn_act_eval and what it is part of: 2-d convolutions of channels-last tensors on the CPU
// with the batch norm, residual and activation behind them, by running statistics and without a gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/conv_arguments.h"
#include "bindings/device.h"
#include "bindings/tensor.h"
#include "cpu/batch_norm.h"
#include "cpu/convolution.h"
#include "cpu/isa.h"
#include "cpu/streaming.h"

namespace fastres::bindings {
namespace {

// Packed weights begin with how they are packed, which other instruction sets do otherwise.
struct PackedHeader {
    static constexpr int64_t floats = 16;  // a cache line

    int32_t block, pack, groups;

    explicit PackedHeader(const cpu::ConvForward& args)
        : block(cpu::convolution_kernels(args.dtype)->block),
          pack(cpu::convolution_kernels(args.dtype)->pack),
          groups(static_cast<int32_t>(args.shape.groups)) {}
};

int64_t packed_bytes(const cpu::ConvForward& args) {
    return (PackedHeader::floats + cpu::packed_floats(args, torch_threads())) * int64_t{sizeof(float)};
}

const float* packed_data(const char* op, const Tensor& packed, const cpu::ConvForward& args) {
    const PackedHeader expected(args);
    if (packed.dim() != 1 || packed.numel() != packed_bytes(args) || !packed.is_contiguous() ||
        !packed.is_cpu() || packed.element_size() != 1 ||
        std::memcmp(packed.data_ptr(), &expected, sizeof expected) != 0)
        fail(op,
             "packed is not what conv_pack_weight makes of this weight with the instruction set in use");
    return static_cast<const float*>(packed.data_ptr()) + PackedHeader::floats;
}

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
    Tensor packed = empty_bytes(weight, packed_bytes(args));
    float* data = static_cast<float*>(packed.data_ptr());
    const PackedHeader header(args);
    std::memset(data, 0, PackedHeader::floats * sizeof(float));
    std::memcpy(data, &header, sizeof header);
    cpu::pack_weight(args, data + PackedHeader::floats, torch_threads());
    return packed;
}

// batch_norm(sums + conv_bias) by the running statistics, as one product and sum.
cpu::Affine affine_of(const char* op, const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const OptionalTensor& weight,
                      const OptionalTensor& bias, const Tensor& input, int64_t channels, double eps) {
    return cpu::affine(channels, channel_vector(op, "conv_bias", conv_bias, input, channels),
                       channel_vector(op, "running_mean", running_mean, input, channels),
                       channel_vector(op, "running_var", running_var, input, channels),
                       channel_vector(op, "weight", weight, input, channels),
                       channel_vector(op, "bias", bias, input, channels), eps);
}

// act(batch_norm(conv2d(input, conv_weight, conv_bias)) [+ residual]) by the running statistics.
Tensor bn_act_eval(Tensor input, Tensor conv_weight_tensor, OptionalTensor packed, OptionalTensor conv_bias,
                   OptionalTensor residual, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                   OptionalTensor bias, Ints stride, Ints padding, Ints dilation, double eps, bool relu) {
    constexpr const char* op = "conv_bn_act_eval";
    cpu::ConvForward args =
        conv_forward(op, input, conv_weight_tensor, residual, stride, padding, dilation);
    if (packed) args.packed = packed_data(op, *packed, args);
    Tensor output = empty_channels_last(input, out_sizes(args.shape));
    const cpu::Affine affine = affine_of(op, conv_bias, running_mean, running_var, weight, bias, input,
                                         args.shape.out_channels, eps);
    args.scale = affine.scale.data();
    args.shift = affine.shift.data();
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.relu = relu;
    args.output = output.data_ptr();
    cpu::conv_forward(args, torch_threads());
    return output;
}

// ---------------------------------------------------------------------------------------------------------
// many of them
// ---------------------------------------------------------------------------------------------------------

// A row of `steps`. Values are numbered: first the inputs, then what each step makes.
struct Step {
    static constexpr int64_t columns = 9;
    enum Column { input, residual, stride, padding = 4, dilation = 6, relu = 8 };  // residual -1: none

    const int64_t* row;

    int64_t operator[](Column column) const { return row[column]; }
    Ints axes(Column column) const { return {row[column], row[column + 1]}; }
};

// Seven tensors a step.
struct StepTensors {
    static constexpr int64_t count = 7;
    enum Name { conv_weight, packed, conv_bias, running_mean, running_var, weight, bias };

    const OptionalTensor* first;

    const OptionalTensor& operator[](Name name) const { return first[name]; }
};

// Memory for the values that live for some steps only: as many blocks as are needed at a time, what was
// freed last is taken first.
class Blocks {
  public:
    int64_t take(int64_t bytes) {
        if (free_.empty()) {
            free_.push_back(static_cast<int64_t>(bytes_.size()));
            bytes_.push_back(0);
        }
        const int64_t block = free_.back();
        free_.pop_back();
        bytes_[block] = std::max(bytes_[block], bytes);
        return block;
    }
    void give_back(int64_t block) { free_.push_back(block); }

    // Where each block begins, and after them where the last one ends.
    Ints offsets() const {
        constexpr int64_t alignment = 4096;
        Ints offsets{0};
        for (const int64_t bytes : bytes_)
            offsets.push_back(offsets.back() + (bytes + alignment - 1) / alignment * alignment);
        return offsets;
    }

  private:
    Ints bytes_, free_;
};

// What conv_bn_act_eval gives, step by step, in one call; those of the values that are asked for. The
// others lie in memory that is used again.
std::vector<Tensor> bn_act_sequence(std::vector<Tensor> inputs, std::vector<OptionalTensor> tensors,
                                    Ints steps, std::vector<double> eps, Ints outputs) {
    constexpr const char* op = "conv_bn_act_sequence";
    const int64_t first = static_cast<int64_t>(inputs.size()), count = static_cast<int64_t>(eps.size());
    if (first == 0) fail(op, "inputs is empty");
    if (static_cast<int64_t>(steps.size()) != count * Step::columns)
        fail(op, "steps takes nine integers for each of eps");
    if (static_cast<int64_t>(tensors.size()) != count * StepTensors::count)
        fail(op, "tensors takes seven for each of eps");
    const auto step_of = [&](int64_t i) { return Step{steps.data() + i * Step::columns}; };
    const Tensor& like = inputs[0];
    const Dtype dtype = dtype_of(op, "inputs", like);

    std::vector<Ints> sizes;
    for (const Tensor& input : inputs) {
        sizes.push_back(sizes_of(input));
        check_operand(op, "inputs", input, sizes.back(), dtype);
    }
    constexpr int64_t never = -1;
    std::vector<int64_t> last_use(first + count, never);
    std::vector<cpu::ConvForward> convolutions;
    std::vector<cpu::Affine> affines;
    for (int64_t i = 0; i < count; ++i) {
        const Step step = step_of(i);
        const StepTensors given{&tensors[i * StepTensors::count]};
        const int64_t source = step[Step::input], residual = step[Step::residual];
        if (source < 0 || source >= first + i || residual < -1 || residual >= first + i)
            fail(op, "a step takes a value that is not there yet");
        for (const auto name : {StepTensors::conv_weight, StepTensors::packed, StepTensors::running_mean,
                                StepTensors::running_var})
            if (!given[name]) fail(op, "weight, packed weight and running statistics are needed");
        convolutions.push_back(conv_forward(op, sizes[source], dtype, *given[StepTensors::conv_weight],
                                            step.axes(Step::stride), step.axes(Step::padding),
                                            step.axes(Step::dilation)));
        cpu::ConvForward& args = convolutions.back();
        args.packed = packed_data(op, *given[StepTensors::packed], args);
        args.relu = step[Step::relu] != 0;
        sizes.push_back(out_sizes(args.shape));
        if (residual >= 0 && sizes[residual] != sizes.back())
            fail(op, "a residual has another shape than what it is added to");
        affines.push_back(affine_of(op, given[StepTensors::conv_bias], given[StepTensors::running_mean],
                                    given[StepTensors::running_var], given[StepTensors::weight],
                                    given[StepTensors::bias], like, args.shape.out_channels, eps[i]));
        last_use[source] = i;
        if (residual >= 0) last_use[residual] = i;
    }
    std::vector<Tensor> results;
    std::vector<void*> data(first + count, nullptr);
    for (int64_t i = 0; i < first; ++i) data[i] = inputs[i].data_ptr();
    for (const int64_t value : outputs) {
        if (value < first || value >= first + count) fail(op, "outputs names a value that no step makes");
        results.push_back(empty_channels_last(like, sizes[value]));
        data[value] = results.back().data_ptr();
    }

    Blocks blocks;
    std::vector<int64_t> block_of(first + count, -1);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t value = first + i, source = step_of(i)[Step::input],
                      residual = step_of(i)[Step::residual];
        const auto dies = [&](int64_t used) {
            return used >= 0 && block_of[used] >= 0 && last_use[used] == i;
        };
        bool in_place = false;
        if (!data[value] && last_use[value] != never) {
            const Ints& size = sizes[value];
            const int64_t bytes = size[0] * size[1] * size[2] * size[3] * size_of(dtype);
            // A sum may take the place of its addend, each value of which is read before its own is
            // written; but what is written past the caches takes longer where it was in them: batch 16
            // 0.95x as fast.
            in_place = residual != source && dies(residual) && bytes < cpu::kStreamingBytes;
            block_of[value] = in_place ? block_of[residual] : blocks.take(bytes);
        }
        if (dies(source)) blocks.give_back(block_of[source]);
        if (dies(residual) && residual != source && !in_place) blocks.give_back(block_of[residual]);
    }
    const Ints offsets = blocks.offsets();
    Tensor memory = empty_channels_last(like, {1, 1, 1, offsets.back() / size_of(dtype)});
    for (int64_t value = first; value < first + count; ++value)
        if (block_of[value] >= 0)
            data[value] = static_cast<char*>(memory.data_ptr()) + offsets[block_of[value]];

    for (int64_t i = 0; i < count; ++i) {
        if (!data[first + i]) continue;  // nobody uses it
        cpu::ConvForward& args = convolutions[i];
        args.input = {data[step_of(i)[Step::input]], nullptr, {}};
        args.scale = affines[i].scale.data();
        args.shift = affines[i].shift.data();
        const int64_t residual = step_of(i)[Step::residual];
        args.residual = residual < 0 ? nullptr : data[residual];
        args.output = data[first + i];
        cpu::conv_forward(args, torch_threads());
    }
    return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "conv_pack_weight(Tensor weight, Tensor like, int[] stride, int[] dilation, int groups) -> Tensor");
    library.def(
        "conv_bn_act_eval(Tensor input, Tensor conv_weight, Tensor? packed, Tensor? conv_bias, "
        "Tensor? residual, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
        "int[] stride, int[] padding, int[] dilation, float eps, bool relu) -> Tensor");
    library.def(
        "conv_bn_act_sequence(Tensor[] inputs, Tensor?[] tensors, int[] steps, float[] eps, int[] outputs) "
        "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("conv_pack_weight", TORCH_BOX(&pack_weight));
    library.impl("conv_bn_act_eval", TORCH_BOX(&bn_act_eval));
    library.impl("conv_bn_act_sequence", TORCH_BOX(&bn_act_sequence));
}

}  // namespace fastres::bindings
