// The gradient of a convolution's weights: products of the input and the output's gradient, summed over the
// pixels.
#include "cpu/conv_weight_grad.h"

#include <vector>

#include "cpu/conv_winograd.h"

namespace fastres::cpu {
namespace {

class DirectLoop : WeightGradTasks {
  public:
    DirectLoop(const ConvBackwardWeight& args, const ThreadPool& pool)
        : WeightGradTasks(args, flattened(args.shape), args.shape.kernel.h * args.shape.kernel.w, pool),
          row_step_(shape_.kernel.h == 1 ? shape_.stride.h : 1),
          in_width_(std::min<int64_t>(kernels_.block, shape_.in_channels)) {}

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
            [&](const Chunk& chunk, const float* sums) { store(chunk, sums); });
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

    int64_t words_of_operands(const Box& largest) const {
        const int64_t row = steps(largest.columns.size());
        return largest.images.size() * row *
               (patch_rows(largest) * shape_.kernel.w * in_chunk_ + largest.rows.size() * out_chunk_);
    }

    // A box's operands, as words.
    struct Words {
        float *grad, *input;
        int64_t grad_block, input_block;    // from one block of channels to the next
        int64_t input_channel, input_step;  // from one channel of the input, or step, to the next
        int64_t in_blocks, row_steps;
    };

    // sums[tap][in channel][out channel] over some boxes
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
        Words loaded{};
        loaded.row_steps = steps(box.columns.size());
        loaded.grad_block = box.images.size() * box.rows.size() * loaded.row_steps * kernels_.block;
        const int64_t input_steps = box.images.size() * patch_rows(box) * loaded.row_steps;
        loaded.input_block = input_steps * in_width_;
        loaded.input_channel = kernels_.load_steps ? input_steps : 1;
        loaded.input_step = kernels_.load_steps ? 1 : in_width_;
        loaded.in_blocks = ceil_div(chunk.in_channels.size(), in_width_);
        loaded.grad = words;
        loaded.input = words + ceil_div(chunk.out_channels.size(), kernels_.block) * loaded.grad_block;
        load_grad(box, chunk.out_channels, loaded.grad, loaded.grad_block);
        for (int64_t kw = 0; kw < shape_.kernel.w; ++kw) load_input(box, chunk.in_channels, kw, loaded);
        return loaded;
    }

    void multiply(const Box& box, const Chunk& chunk, const Words& words, bool add, float* sums,
                  Prefetch& prefetch) const {
        // Rows of an image that are neighbours in the patch are one run.
        const bool merged = row_step_ > 1 || shape_.stride.h == 1;
        const int64_t rows = box.rows.size(), patch = patch_rows(box), rows_of_run = merged ? rows : 1;
        std::vector<int64_t> runs(box.images.size() * rows / rows_of_run);
        MultiplyTile tile{};
        tile.row_stride = words.input_channel;
        tile.step_stride = words.input_step;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = rows_of_run * words.row_steps;
        tile.sums_stride = out_chunk_;
        tile.add = add;
        for (int64_t kh = 0; kh < shape_.kernel.h; ++kh) {
            for (int64_t run = 0; run < tile.run_count; ++run) {
                const int64_t image = run * rows_of_run / rows, row = run * rows_of_run % rows;
                const int64_t patch_row =
                    row_step_ > 1 ? row : row * shape_.stride.h + kh * shape_.dilation.h;
                runs[run] = (image * patch + patch_row) * words.row_steps * words.input_step;
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
        for (int64_t n = 0; n < chunk.out_channels.size(); n += kernels_.block) {
            tile.b = words.grad + n / kernels_.block * words.grad_block;
            tile.vectors = cpu::vectors_of(kernels_, chunk.out_channels.size() - n);
            for (int64_t m = 0; m < chunk.in_channels.size(); m += in_width_) {
                const int64_t width = std::min(in_width_, chunk.in_channels.size() - m);
                const int64_t groups = ceil_div(width, kernels_.tile_rows);
                for (int64_t group = 0; group < groups; ++group) {
                    const Range channels = part(width, groups, group, kernels_.row_grain);
                    tile.a = words.input + (kw * words.in_blocks + m / in_width_) * words.input_block +
                             channels.begin * words.input_channel;
                    tile.sums = sums + (m + channels.begin) * out_chunk_ + n;
                    tile.rows = static_cast<int>(channels.size());
                    prefetch.step();
                    kernels_.multiply(tile);
                }
            }
        }
    }

    int64_t multiplications(const Chunk& chunk) const {
        return taps_ * ceil_div(in_width_, kernels_.tile_rows) *
               ceil_div(chunk.in_channels.size(), in_width_) *
               ceil_div(chunk.out_channels.size(), kernels_.block);
    }

    void load_grad(const Box& box, Range channels, float* words, int64_t block_stride) const {
        PixelRow pixels{};
        pixels.column = box.columns.begin;
        pixels.column_step = 1;
        pixels.columns = box.columns.size();
        pixels.first_channel = channels.begin;
        pixels.channels = channels.size();
        const ImageRows rows{box.images, box.rows.begin, 1, box.rows.size()};
        visit_rows(args_.grad, args_.dtype, shape_.out, shape_.out_channels, rows, pixels,
                   [&](const PixelRow& row) {
                       kernels_.load_pixels(row, kernels_.block, words, block_stride);
                       words += steps(row.columns) * kernels_.block;
                   });
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
                       if (kernels_.load_steps)
                           kernels_.load_steps(row, words, loaded.input_channel);
                       else
                           kernels_.load_pixels(row, in_width_, words, loaded.input_block);
                       words += loaded.row_steps * loaded.input_step;
                   });
    }

    const int64_t row_step_;  // input rows from one row of a patch to the next
    const int64_t in_width_;  // words of a step of the input
};

}  // namespace

void conv_backward_weight(const ConvBackwardWeight& args, const ThreadPool& pool) {
    const Conv2d& shape = args.shape;
    if (shape.groups > 1) return weight_grad_by_groups(args, pool);
    const auto is = [](Axes axes, int64_t value) { return axes.h == value && axes.w == value; };
    constexpr int64_t least_pixels = 768;  // of fewer it is no faster, and PyTorch's sums are exact
    const bool winograd = is(shape.kernel, 3) && is(shape.stride, 1) && is(shape.dilation, 1) &&
                          winograd_pays(*convolution_kernels(args.dtype), shape.batch, shape.out,
                                        shape.in_channels, shape.out_channels, least_pixels);
    if (winograd) return weight_grad_by_winograd(args, pool);
    DirectLoop(args, pool).run();
}

}  // namespace fastres::cpu
