// The gradient of a convolution's weights: products of the input and the output's gradient, summed over the
// pixels.
#include "cpu/conv_weight_grad.h"

#include <vector>

#include "cpu/conv_gather.h"
#include "cpu/conv_winograd.h"

namespace fastres::cpu {
namespace {

class DirectLoop : WeightGradTasks {
  public:
    // `input_grad` is null, or it is given the boxes, too.
    DirectLoop(const ConvBackwardWeight& args, const InputGradByBox* input_grad, const ThreadPool& pool)
        : WeightGradTasks(args, flattened(args.shape), args.shape.kernel.h * args.shape.kernel.w, pool),
          row_step_(shape_.kernel.h == 1 ? shape_.stride.h : 1),
          out_width_(std::min<int64_t>(kernels_.block, shape_.out_channels)),
          input_grad_(input_grad) {}

    // Whether a box is loaded once, for all channels.
    bool has_one_chunk() const { return chunks() == 1; }

    void run() const {
        // The rounding errors of bf16's sums are lost in that of the operands.
        constexpr int64_t usual = 224;
        const Boxes boxes(shape_.batch, shape_.out,
                          args_.dtype == Dtype::bf16 ? usual : size_of_box(usual));
        WeightGradTasks::run(
            boxes, words_of_operands(boxes.largest()),
            [&](const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) {
                sum(boxes, range, chunk, words, sums);
            },
            [&](const Chunk& chunk, const float* sums) { store(chunk, sums, RowsOf::out_channels); });
    }

  private:
    static Conv2d flattened(Conv2d shape) {
        const bool pointwise = shape.kernel.h == 1 && shape.kernel.w == 1 && shape.stride.h == 1 &&
                               shape.stride.w == 1 && shape.padding.h == 0 && shape.padding.w == 0;
        if (pointwise) {
            shape.in = shape.out = {1, shape.batch * shape.in.h * shape.in.w};
            shape.batch = 1;
        }
        return shape;
    }

    int64_t steps(int64_t columns) const { return ceil_div(columns, kernels_.pack); }

    int64_t patch_rows(const Box& box) const {
        return row_step_ > 1 ? box.rows.size()
                             : (box.rows.size() - 1) * shape_.stride.h +
                                   (shape_.kernel.h - 1) * shape_.dilation.h + 1;
    }

    // Rows of the output that are multiplied as one: those of an image which are neighbours in the patch.
    int64_t rows_of_run(const Box& box) const {
        return row_step_ > 1 || shape_.stride.h == 1 ? box.rows.size() : 1;
    }
    int64_t runs_of(const Box& box) const { return box.images.size() * box.rows.size() / rows_of_run(box); }
    int64_t steps_of_run(const Box& box) const { return rows_of_run(box) * steps(box.columns.size()); }
    // What a run of the gradient takes of each channel.
    int64_t words_of_run(const Box& box) const {
        return kernels_.load_steps ? Slots(steps_of_run(box)).count * Slots::kSize : steps_of_run(box);
    }

    int64_t words_of_operands(const Box& largest) const {
        const int64_t input_steps =
            largest.images.size() * patch_rows(largest) * steps(largest.columns.size());
        return runs_of(largest) * words_of_run(largest) * out_chunk_ +
               input_steps * shape_.kernel.w * in_chunk_;
    }

    // A box's operands, as words.
    struct Words {
        float *grad, *input;
        int64_t grad_block, input_block;  // from one block of channels to the next
        int64_t grad_run;                 // from one run of the gradient to the next
        int64_t grad_channel, grad_step;  // from one channel of it, or step, to the next
        int64_t row_steps, run_steps, in_blocks;
    };

    // sums[tap][out channel][in channel] over some boxes
    void sum(const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) const {
        for (int64_t index = range.begin; index < range.end; ++index) {
            const Box box = boxes[index];
            Prefetch prefetch;
            if (index + 1 < range.end) fetch(boxes[index + 1], chunk, prefetch);
            prefetch.spread(multiplications(chunk));
            multiply(box, chunk, load(box, chunk, words), index > range.begin, sums, prefetch);
        }
    }

    Words load(const Box& box, const Chunk& chunk, float* words) const {
        const int64_t grad_words = runs_of(box) * words_of_run(box);
        Words loaded{};
        loaded.row_steps = steps(box.columns.size());
        loaded.run_steps = steps_of_run(box);
        loaded.grad_block = grad_words * out_width_;
        loaded.grad_channel = kernels_.load_steps ? grad_words : 1;
        loaded.grad_step = kernels_.load_steps ? 1 : out_width_;
        loaded.grad_run = words_of_run(box) * loaded.grad_step;
        loaded.input_block = box.images.size() * patch_rows(box) * loaded.row_steps * kernels_.block;
        loaded.in_blocks = ceil_div(chunk.in_channels.size(), kernels_.block);
        loaded.grad = words;
        loaded.input = words + ceil_div(chunk.out_channels.size(), out_width_) * loaded.grad_block;
        load_grad(box, chunk.out_channels, loaded);
        for (int64_t kw = 0; kw < shape_.kernel.w; ++kw) load_input(box, chunk.in_channels, kw, loaded);
        return loaded;
    }

    void multiply(const Box& box, const Chunk& chunk, const Words& words, bool add, float* sums,
                  Prefetch& prefetch) const {
        const int64_t patch = patch_rows(box);
        std::vector<int64_t> runs(runs_of(box)), input_runs(runs.size());
        for (size_t run = 0; run < runs.size(); ++run)
            runs[run] = static_cast<int64_t>(run) * words.grad_run;
        MultiplyTile tile{};
        tile.row_stride = words.grad_channel;
        tile.step_stride = words.grad_step;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = words.run_steps;
        tile.b_runs = input_runs.data();
        tile.in_slots = true;
        tile.sums_stride = in_chunk_;
        tile.add = add;
        for (int64_t kh = 0; kh < shape_.kernel.h; ++kh) {
            for (int64_t run = 0; run < tile.run_count; ++run) {
                const int64_t out_row = run * rows_of_run(box);
                const int64_t image = out_row / box.rows.size(), row = out_row % box.rows.size();
                const int64_t patch_row =
                    row_step_ > 1 ? row : row * shape_.stride.h + kh * shape_.dilation.h;
                input_runs[run] = (image * patch + patch_row) * words.row_steps * kernels_.block;
            }
            for (int64_t kw = 0; kw < shape_.kernel.w; ++kw) {
                const int64_t tap = kh * shape_.kernel.w + kw;
                multiply_tap(tile, chunk, words, kw, sums + tap * in_chunk_ * out_chunk_, prefetch);
            }
        }
    }

    // All pairs of channels of a chunk, for one entry of the kernel; kw is its column.
    void multiply_tap(MultiplyTile tile, const Chunk& chunk, const Words& words, int64_t kw, float* sums,
                      Prefetch& prefetch) const {
        for (int64_t n = 0; n < chunk.in_channels.size(); n += kernels_.block) {
            tile.b = words.input + (kw * words.in_blocks + n / kernels_.block) * words.input_block;
            tile.vectors = cpu::vectors_of(kernels_, chunk.in_channels.size() - n);
            for (int64_t m = 0; m < chunk.out_channels.size(); m += out_width_) {
                const int64_t width = std::min(out_width_, chunk.out_channels.size() - m);
                const int64_t groups = ceil_div(width, kernels_.tile_rows);
                for (int64_t group = 0; group < groups; ++group) {
                    const Range channels = part(width, groups, group, kernels_.row_grain);
                    tile.a = words.grad + m / out_width_ * words.grad_block +
                             channels.begin * words.grad_channel;
                    tile.sums = sums + (m + channels.begin) * in_chunk_ + n;
                    tile.rows = static_cast<int>(channels.size());
                    prefetch.step();
                    kernels_.multiply(tile);
                }
            }
        }
    }

    int64_t multiplications(const Chunk& chunk) const {
        return taps_ * ceil_div(out_width_, kernels_.tile_rows) *
               ceil_div(chunk.out_channels.size(), out_width_) *
               ceil_div(chunk.in_channels.size(), kernels_.block);
    }

    void load_grad(const Box& box, Range channels, const Words& loaded) const {
        PixelRow pixels{};
        pixels.column_step = 1;
        pixels.columns = box.columns.size();
        pixels.channels = channels.size();
        int64_t first_step = 0;  // of the row in its run
        float* words = loaded.grad;
        const auto load_row = [&](const PixelRow& row) {
            if (kernels_.load_steps)
                kernels_.load_steps(row, words, loaded.grad_channel, first_step, loaded.run_steps);
            else
                kernels_.load_pixels(row, out_width_, words + first_step * loaded.grad_step,
                                     loaded.grad_block);
            first_step += loaded.row_steps;
            if (first_step < loaded.run_steps) return;
            first_step = 0;
            words += loaded.grad_run;
        };
        if (input_grad_) {
            // Of the box alone, and as they are.
            pixels.row = (*input_grad_)(box.columns);
            pixels.width = pixels.columns;
            pixels.pixel_stride = pixels.channels;
            return load_row(pixels);
        }
        pixels.column = box.columns.begin;
        pixels.first_channel = channels.begin;
        visit_rows(args_.grad, args_.dtype, shape_.out, shape_.out_channels,
                   {box.images, box.rows.begin, 1, box.rows.size()}, pixels, load_row);
    }

    // What one column of the kernel sees.
    void load_input(const Box& box, Range channels, int64_t kw, const Words& loaded) const {
        float* words = loaded.input + kw * loaded.in_blocks * loaded.input_block;
        PixelRow pixels{};
        pixels.column = box.columns.begin * shape_.stride.w - shape_.padding.w + kw * shape_.dilation.w;
        pixels.column_step = shape_.stride.w;
        pixels.columns = box.columns.size();
        pixels.first_channel = channels.begin;
        pixels.channels = channels.size();
        const ImageRows rows{box.images, box.rows.begin * shape_.stride.h - shape_.padding.h, row_step_,
                             patch_rows(box)};
        visit_rows(args_.input, args_.dtype, shape_.in, shape_.in_channels, rows, pixels,
                   [&](const PixelRow& row) {
                       kernels_.load_pixels(row, kernels_.block, words, loaded.input_block);
                       words += loaded.row_steps * kernels_.block;
                   });
    }

    const int64_t row_step_;   // input rows from one row of a patch to the next
    const int64_t out_width_;  // words of a step of the gradient
    const InputGradByBox* const input_grad_;
};

bool winograd_pays(const ConvBackwardWeight& args) {
    const Conv2d& shape = args.shape;
    const auto is = [](Axes axes, int64_t value) { return axes.h == value && axes.w == value; };
    constexpr int64_t least_pixels = 768;  // of fewer it is no faster, and PyTorch's sums are exact
    return is(shape.kernel, 3) && is(shape.stride, 1) && is(shape.dilation, 1) &&
           winograd_pays(*convolution_kernels(args.dtype), shape.batch, shape.out, shape.in_channels,
                         shape.out_channels, least_pixels);
}

}  // namespace

void conv_backward_weight(const ConvBackwardWeight& args, const ThreadPool& pool) {
    if (args.shape.groups > 1) return weight_grad_by_groups(args, pool);
    if (winograd_pays(args)) return weight_grad_by_winograd(args, pool);
    DirectLoop(args, nullptr, pool).run();
}

void conv_backward(const ConvBackwardInput& input, const ConvBackwardWeight& weight,
                   const ThreadPool& pool) {
    const Conv2d& shape = weight.shape;
    if (shape.groups == 1 && shape.batch * shape.in.h * shape.in.w > 0) {
        InputGradByBox input_grad(input, pool);
        const DirectLoop loop(weight, &input_grad, pool);
        if (input_grad.keeps_values() && loop.has_one_chunk()) {
            input_grad.begin();
            return loop.run();
        }
    }
    conv_backward_input(input, pool);
    conv_backward_weight(weight, pool);
}

}  // namespace fastres::cpu
