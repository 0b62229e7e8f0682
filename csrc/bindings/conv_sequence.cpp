// fastres::conv_bn_act_sequence: what conv_bn_act_eval gives, many times in one call, and with memory
// between them that is used again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "bindings/conv_arguments.h"
#include "bindings/device.h"
#include "bindings/tensor.h"
#include "cpu/batch_norm.h"
#include "cpu/convolution.h"
#include "cpu/streaming.h"

namespace fastres::bindings {
namespace {

constexpr const char* op = "conv_bn_act_sequence";

// A row of `steps`. Values are numbered: first the inputs, then what each step makes.
struct Step {
    static constexpr int64_t columns = 9;
    static constexpr int64_t none = -1;  // for a residual

    explicit Step(const int64_t* row)
        : input(row[0]),
          residual(row[1]),
          stride{row[2], row[3]},
          padding{row[4], row[5]},
          dilation{row[6], row[7]},
          relu(row[8] != 0) {}

    int64_t input, residual;
    Ints stride, padding, dilation;
    bool relu;
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

struct Sequence {
    int64_t given;  // values that are inputs
    std::vector<Step> steps;
    std::vector<Ints> sizes;                     // of the values
    std::vector<cpu::ConvForward> convolutions;  // but for where their values are
    std::vector<cpu::Affine> affines;
};

Sequence sequence(const std::vector<Tensor>& inputs, const std::vector<OptionalTensor>& tensors,
                  const Ints& steps, const std::vector<double>& eps) {
    const int64_t count = static_cast<int64_t>(eps.size());
    if (inputs.empty()) fail(op, "inputs is empty");
    if (static_cast<int64_t>(steps.size()) != count * Step::columns)
        fail(op, "steps takes nine integers for each of eps");
    if (static_cast<int64_t>(tensors.size()) != count * StepTensors::count)
        fail(op, "tensors takes seven for each of eps");
    const Dtype dtype = dtype_of(op, "inputs", inputs[0]);
    Sequence all{static_cast<int64_t>(inputs.size()), {}, {}, {}, {}};
    for (const Tensor& input : inputs) {
        all.sizes.push_back(sizes_of(input));
        check_operand(op, "inputs", input, all.sizes.back(), dtype);
    }
    for (int64_t i = 0; i < count; ++i) {
        const Step step(steps.data() + i * Step::columns);
        const StepTensors of_step{&tensors[i * StepTensors::count]};
        const int64_t made = all.given + i;
        if (step.input < 0 || step.input >= made || step.residual < Step::none || step.residual >= made)
            fail(op, "a step takes a value that is not there yet");
        for (const auto name : {StepTensors::conv_weight, StepTensors::packed, StepTensors::running_mean,
                                StepTensors::running_var})
            if (!of_step[name]) fail(op, "weight, packed weight and running statistics are needed");
        cpu::ConvForward args =
            conv_forward(op, all.sizes[step.input], dtype, *of_step[StepTensors::conv_weight], step.stride,
                         step.padding, step.dilation);
        args.packed = packed_data(op, *of_step[StepTensors::packed], args);
        args.relu = step.relu;
        all.sizes.push_back(out_sizes(args.shape));
        if (step.residual != Step::none && all.sizes[step.residual] != all.sizes.back())
            fail(op, "a residual has another shape than what it is added to");
        all.affines.push_back(
            running_affine(op, of_step[StepTensors::conv_bias], of_step[StepTensors::running_mean],
                           of_step[StepTensors::running_var], of_step[StepTensors::weight],
                           of_step[StepTensors::bias], inputs[0], args.shape.out_channels, eps[i]));
        all.convolutions.push_back(args);
        all.steps.push_back(step);
    }
    return all;
}

// Gives the values that have no memory yet, and that a step takes, a place in `blocks`: the block of each,
// or none.
Ints place(const Sequence& all, const std::vector<void*>& memory, int64_t element, Blocks& blocks) {
    constexpr int64_t none = -1;
    const int64_t values = static_cast<int64_t>(memory.size());
    Ints last_use(values, none), block_of(values, none);
    for (int64_t i = 0; i < static_cast<int64_t>(all.steps.size()); ++i) {
        last_use[all.steps[i].input] = i;
        if (all.steps[i].residual != Step::none) last_use[all.steps[i].residual] = i;
    }
    for (int64_t i = 0; i < static_cast<int64_t>(all.steps.size()); ++i) {
        const int64_t value = all.given + i, input = all.steps[i].input, residual = all.steps[i].residual;
        const auto dies = [&](int64_t used) {
            return used != Step::none && block_of[used] != none && last_use[used] == i;
        };
        bool in_place = false;
        if (!memory[value] && last_use[value] != none) {
            const Ints& size = all.sizes[value];
            const int64_t bytes = size[0] * size[1] * size[2] * size[3] * element;
            // A sum may take the place of its addend, each value of which is read before its own is
            // written; but what is written past the caches takes longer where it was in them: batch 16
            // 0.95x as fast.
            in_place = residual != input && dies(residual) && bytes < cpu::streaming_bytes();
            block_of[value] = in_place ? block_of[residual] : blocks.take(bytes);
        }
        if (dies(input)) blocks.give_back(block_of[input]);
        if (dies(residual) && residual != input && !in_place) blocks.give_back(block_of[residual]);
    }
    return block_of;
}

// By the clock of Python's time.perf_counter.
double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The values named by `outputs`; and if `timed`, behind them the times of the call, of each step's begin
// and of the last one's end.
std::vector<Tensor> run(std::vector<Tensor> inputs, std::vector<OptionalTensor> tensors, Ints steps,
                        std::vector<double> eps, Ints outputs, bool timed) {
    std::vector<double> times;
    const auto mark = [&] {
        if (timed) times.push_back(seconds_now());
    };
    mark();
    Sequence all = sequence(inputs, tensors, steps, eps);
    const int64_t values = static_cast<int64_t>(all.sizes.size());
    std::vector<void*> memory(values, nullptr);
    for (int64_t i = 0; i < all.given; ++i) memory[i] = inputs[i].data_ptr();
    for (const int64_t value : outputs)
        if (value < all.given || value >= values) fail(op, "outputs names a value that no step makes");
    std::vector<Tensor> results;
    for (const int64_t value : outputs) {
        if (memory[value]) fail(op, "outputs names a value twice");
        results.push_back(empty_channels_last(inputs[0], all.sizes[value]));
        memory[value] = results.back().data_ptr();
    }
    const int64_t element = size_of(dtype_of(op, "inputs", inputs[0]));
    Blocks blocks;
    const Ints block_of = place(all, memory, element, blocks), offsets = blocks.offsets();
    const Tensor between = empty_channels_last(inputs[0], {1, 1, 1, offsets.back() / element});
    for (int64_t value = 0; value < values; ++value)
        if (!memory[value] && block_of[value] >= 0)
            memory[value] = static_cast<char*>(between.data_ptr()) + offsets[block_of[value]];
    for (int64_t i = 0; i < static_cast<int64_t>(all.steps.size()); ++i) {
        const Step& step = all.steps[i];
        cpu::ConvForward& args = all.convolutions[i];
        mark();
        args.output = memory[all.given + i];
        if (!args.output) continue;  // nobody takes it
        args.input = {memory[step.input], nullptr, {}};
        args.residual = step.residual == Step::none ? nullptr : memory[step.residual];
        args.scale = all.affines[i].scale.data();
        args.shift = all.affines[i].shift.data();
        cpu::conv_forward(args, torch_threads());
    }
    mark();
    if (timed) {
        results.push_back(empty_values(inputs[0], static_cast<int64_t>(times.size()), Dtype::f64));
        std::copy(times.begin(), times.end(), static_cast<double*>(results.back().data_ptr()));
    }
    return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def(
        "conv_bn_act_sequence(Tensor[] inputs, Tensor?[] tensors, int[] steps, float[] eps, int[] outputs, "
        "bool timed=False) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("conv_bn_act_sequence", TORCH_BOX(&run));
}

}  // namespace fastres::bindings
