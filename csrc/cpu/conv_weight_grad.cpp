// The gradient of a convolution's weights: products of the input and the output's gradient, summed over the
// pixels.
#include "cpu/conv_weight_grad.h"

#include <cstring>
#include <utility>
#include <vector>

#include "cpu/conv_gather.h"
#include "cpu/conv_winograd.h"

namespace fastres::cpu {
namespace {

class DirectLoop : WeightGradTasks {
  public:
    // `input_grad` is null, or it is given the boxes, too.
    DirectLoop(const ConvBackwardWeight& args, const InputGradByBox* input_grad, const ThreadPool& pool)
        : DirectLoop(args, walked(args), input_grad, pool) {}

    // Whether a box is loaded once, for all channels.
    bool has_one_chunk() const { return chunks() == 1; }

    void run() const {
        // The rounding errors of bf16's sums are lost in that of the operands.
        constexpr int64_t usual = 224, of_images = 896;
        const Boxes boxes(
            shape_.batch, shape_.out,
            args_.dtype == Dtype::bf16 ? (of_images_ ? of_images : usual) : size_of_box(usual));
        WeightGradTasks::run(
            boxes, words_of_operands(boxes.largest()),
            [&](const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) {
                sum(boxes, range, chunk, words, sums);
            },
            [&](const Chunk& chunk, const float* sums) { store(chunk, sums, rows_); });
    }

  private:
    DirectLoop(const ConvBackwardWeight& args, const Conv2d& shape, const InputGradByBox* input_grad,
               const ThreadPool& pool)
        : WeightGradTasks(args, shape, shape.kernel.h * shape.kernel.w, pool),
          of_images_(shape.in_channels != args.shape.in_channels),
          rows_(kernels_.load_steps && shape_.in_channels >= kernels_.block ? RowsOf::out_channels
                                                                            : RowsOf::in_channels),
          row_width_(
              std::min<int64_t>(kernels_.block, of_out() ? shape_.out_channels : shape_.in_channels)),
          one_plane_(kernels_.pack == 1 && shape_.stride.w == 1 && shape_.kernel.w > 1 &&
                     shape_.out.w >= kLeastColumns),
          input_grad_(input_grad) {}

    // An image's few channels would leave most rows of a tile unused. But what a row of the kernel sees of
    // it is one stretch of memory: taken as the channels of a single pixel, a 7x7 convolution of 3 channels
    // is a 7x1 of 21, whose pixels overlap.
    static bool is_of_images(const ConvBackwardWeight& args) {
        constexpr int64_t most_channels = 4;
        const Conv2d& shape = args.shape;
        return shape.in_channels <= most_channels && shape.kernel.w > 1 && shape.dilation.w == 1 &&
               args.input.prologue.kind == Prologue::none &&
               // The columns' weights follow each other as the channels' do.
               args.grad_weight.stride_w == shape.in_channels * args.grad_weight.stride_in;
    }

    // The convolution that the loops walk over.
    static Conv2d walked(const ConvBackwardWeight& args) {
        Conv2d shape = args.shape;
        if (is_of_images(args)) {
            shape.in_channels *= shape.kernel.w;
            shape.kernel.w = 1;
            shape.padding.w = 0;
            return shape;
        }
        const bool pointwise = shape.kernel.h == 1 && shape.kernel.w == 1 && shape.stride.h == 1 &&
                               shape.stride.w == 1 && shape.padding.h == 0 && shape.padding.w == 0;
        if (pointwise) {
            shape.in = shape.out = {1, shape.batch * shape.in.h * shape.in.w};
            shape.batch = 1;
        }
        return shape;
    }

    int64_t steps(int64_t columns) const { return ceil_div(columns, kernels_.pack); }

    // Of the input.
    RowOrder rows_of(const Box& box) const {
        const int64_t taps = shape_.kernel.h;
        return rows_seen(box.rows.size(), shape_.stride.h, (taps - 1) * shape_.dilation.h + 1, taps);
    }

    // Whether the rows of the sums are out channels, and the lanes in channels. What the kernel's rows
    // shift is then not the operand that tiles load faster from where lines of the cache begin. But few
    // channels fill rows better than lanes.
    bool of_out() const { return rows_ == RowsOf::out_channels; }

    // A run is what a box has of an image, or of a row of it where the kernel's columns share a plane.
    int64_t rows_of_run(const Box& box) const { return one_plane_ ? 1 : box.rows.size(); }
    int64_t runs_of(const Box& box) const { return box.images.size() * box.rows.size() / rows_of_run(box); }
    int64_t steps_of_run(const Box& box) const { return rows_of_run(box) * steps(box.columns.size()); }
    // What a run of the gradient takes of each channel.
    int64_t grad_run(const Box& box) const {
        return of_out() ? Slots(steps_of_run(box)).count * Slots::kSize : steps_of_run(box);
    }
    int64_t grad_steps(const Box& box) const { return runs_of(box) * grad_run(box); }
    // Of a row of the input, in a plane.
    int64_t input_columns(const Box& box) const {
        return box.columns.size() + (one_plane_ ? (shape_.kernel.w - 1) * shape_.dilation.w : 0);
    }
    int64_t input_steps(const Box& box) const {
        return box.images.size() * rows_of(box).count() * steps(input_columns(box));
    }
    int64_t planes() const { return one_plane_ ? 1 : shape_.kernel.w; }

    int64_t words_of_operands(const Box& largest) const {
        return grad_steps(largest) * out_chunk_ + input_steps(largest) * planes() * in_chunk_;
    }

    // A box's words of an operand.
    struct Words {
        float* data;
        int64_t channels, width;  // width: those of a block
        bool by_steps;            // as load_steps leaves them; else as load_pixels does
        int64_t column;           // from what a column of the kernel sees to the next; 0: all see the same
        int64_t block;            // from one block of channels to the next
        int64_t channel;          // from one channel to the next, where they are rows
        int64_t step;             // from one step to the next

        // Of a plane.
        int64_t size() const { return ceil_div(channels, width) * block; }
    };
    struct Operands {
        Words grad, input;
    };

    Words words_of(float* data, int64_t channels, int64_t steps, bool rows) const {
        const int64_t width = rows ? row_width_ : kernels_.block;
        const bool by_steps = rows && kernels_.load_steps;
        Words words{};
        words.data = data;
        words.channels = channels;
        words.width = width;
        words.by_steps = by_steps;
        words.block = steps * width;
        words.channel = by_steps ? steps : 1;
        words.step = by_steps ? 1 : width;
        return words;
    }

    // The sums of each tap, [row][lane], over some boxes.
    void sum(const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) const {
        for (int64_t index = range.begin; index < range.end; ++index) {
            const Box box = boxes[index];
            Prefetch prefetch;
            if (index + 1 < range.end) fetch(boxes[index + 1], chunk, prefetch);
            prefetch.spread(multiplications(chunk));
            multiply(box, load(box, chunk, words), index > range.begin, sums, prefetch);
        }
    }

    Operands load(const Box& box, const Chunk& chunk, float* words) const {
        Operands loaded{};
        loaded.grad = words_of(words, chunk.out_channels.size(), grad_steps(box), of_out());
        loaded.input =
            words_of(words + loaded.grad.size(), chunk.in_channels.size(), input_steps(box), !of_out());
        loaded.input.column = one_plane_ ? shape_.dilation.w * loaded.input.step : loaded.input.size();
        load_grad(box, chunk.out_channels, loaded.grad);
        for (int64_t kw = 0; kw < planes(); ++kw) load_input(box, chunk.in_channels, kw, loaded.input);
        return loaded;
    }

    void multiply(const Box& box, const Operands& words, bool add, float* sums, Prefetch& prefetch) const {
        std::vector<int64_t> grad_runs(runs_of(box)), input_runs(grad_runs.size());
        for (size_t run = 0; run < grad_runs.size(); ++run)
            grad_runs[run] = static_cast<int64_t>(run) * grad_run(box) * words.grad.step;
        const Words& rows = of_out() ? words.grad : words.input;
        MultiplyTile tile{};
        tile.row_stride = rows.channel;
        tile.step_stride = rows.step;
        tile.runs = (of_out() ? grad_runs : input_runs).data();
        tile.b_runs = (of_out() ? input_runs : grad_runs).data();
        tile.in_slots = of_out();
        tile.run_count = runs_of(box);
        tile.steps = steps_of_run(box);
        tile.sums_stride = of_out() ? in_chunk_ : out_chunk_;
        tile.add = add;
        tile.prefetch = &prefetch;
        const RowOrder order = rows_of(box);
        for (int64_t kh = 0; kh < shape_.kernel.h; ++kh) {
            const int64_t first_row = order.place(kh * shape_.dilation.h);
            for (int64_t run = 0; run < tile.run_count; ++run) {
                const int64_t row = run * rows_of_run(box);  // of the output
                const int64_t image = row / box.rows.size();
                input_runs[run] = (image * order.count() + first_row + row % box.rows.size()) *
                                  steps(input_columns(box)) * words.input.step;
            }
            for (int64_t kw = 0; kw < shape_.kernel.w; ++kw) {
                const int64_t tap = kh * shape_.kernel.w + kw;
                multiply_tap(tile, words, kw, sums + tap * in_chunk_ * out_chunk_);
            }
        }
    }

    // All pairs of channels of a chunk, for one entry of the kernel; kw is its column.
    void multiply_tap(MultiplyTile tile, const Operands& words, int64_t kw, float* sums) const {
        const Words& rows = of_out() ? words.grad : words.input;
        const Words& lanes = of_out() ? words.input : words.grad;
        for (int64_t n = 0; n < lanes.channels; n += lanes.width) {
            tile.b = lanes.data + kw * lanes.column + n / lanes.width * lanes.block;
            tile.vectors = cpu::vectors_of(kernels_, lanes.channels - n);
            for (int64_t m = 0; m < rows.channels; m += rows.width) {
                const int64_t width = std::min(rows.width, rows.channels - m);
                const int64_t groups = ceil_div(width, kernels_.tile_rows);
                for (int64_t group = 0; group < groups; ++group) {
                    const Range channels = part(width, groups, group, kernels_.row_grain);
                    tile.a = rows.data + kw * rows.column + m / rows.width * rows.block +
                             channels.begin * rows.channel;
                    tile.sums = sums + (m + channels.begin) * tile.sums_stride + n;
                    tile.rows = static_cast<int>(channels.size());
                    kernels_.multiply(tile);
                }
            }
        }
    }

    int64_t multiplications(const Chunk& chunk) const {
        const auto [rows, lanes] = of_out() ? std::pair(chunk.out_channels, chunk.in_channels)
                                            : std::pair(chunk.in_channels, chunk.out_channels);
        return taps_ * ceil_div(row_width_, kernels_.tile_rows) * ceil_div(rows.size(), row_width_) *
               ceil_div(lanes.size(), kernels_.block);
    }

    // To `step` of the run of `steps` that begins at `words`.
    void load_row(const PixelRow& row, const Words& to, float* words, int64_t step, int64_t steps) const {
        if (to.by_steps) return kernels_.load_steps(row, words, to.channel, step, steps);
        kernels_.load_pixels(row, to.width, words + step * to.step, to.block);
    }

    void load_grad(const Box& box, Range channels, const Words& to) const {
        PixelRow pixels{};
        pixels.column_step = 1;
        pixels.columns = box.columns.size();
        pixels.channels = channels.size();
        int64_t step = 0;
        float* run = to.data;
        const auto load = [&](const PixelRow& row) {
            load_row(row, to, run, step, steps_of_run(box));
            step += steps(row.columns);
            if (step < steps_of_run(box)) return;
            step = 0;
            run += grad_run(box) * to.step;
        };
        if (input_grad_) {
            // Of the box alone, and as they are.
            pixels.row = (*input_grad_)(box.columns);
            pixels.width = pixels.columns;
            pixels.pixel_stride = pixels.channels;
            return load(pixels);
        }
        pixels.column = box.columns.begin;
        pixels.first_channel = channels.begin;
        visit_rows(args_.grad, args_.dtype, shape_.out, shape_.out_channels,
                   {box.images, box.rows.begin, {box.rows.size()}}, pixels, load);
    }

    // What one column of the kernel sees, or all of them.
    void load_input(const Box& box, Range channels, int64_t kw, const Words& to) const {
        PixelRow pixels{};
        pixels.column = box.columns.begin * shape_.stride.w - shape_.padding.w + kw * shape_.dilation.w;
        pixels.column_step = shape_.stride.w;
        pixels.columns = input_columns(box);
        pixels.first_channel = channels.begin;
        pixels.channels = channels.size();
        const ImageRows rows{box.images, box.rows.begin * shape_.stride.h - shape_.padding.h, rows_of(box)};
        int64_t step = 0;
        visit_rows(args_.input, args_.dtype, shape_.in, args_.shape.in_channels, rows, pixels,
                   [&](const PixelRow& row) {
                       // Full slots, without a gap: where runs begin depends on the kernel's row.
                       load_row(of_images_ ? padded(row, to.by_steps) : row, to, to.data + kw * to.column,
                                step, Slots::kSize);
                       step += steps(row.columns);
                   });
    }

    // A row of an image with its padding. What is loaded by steps is in whole vectors: what they take of
    // the values behind a pixel's channels is not stored.
    PixelRow padded(PixelRow row, bool by_steps) const {
        static thread_local Workspace workspace;
        const int64_t lanes = by_steps ? kernels_.block / kernels_.vectors : 1;
        const int64_t value = size_of(args_.dtype), pixel = row.pixel_stride * value;
        const int64_t beside = args_.shape.padding.w * pixel, inside = row.width * pixel;
        const int64_t behind = beside + lanes * value;
        if (row.row) {
            const int64_t bytes = beside + inside + behind;
            float* memory = workspace.floats(ceil_div(bytes, static_cast<int64_t>(sizeof(float))));
            char* values = reinterpret_cast<char*>(memory);
            std::memset(values, 0, beside);
            std::memcpy(values + beside, row.row, inside);
            std::memset(values + beside + inside, 0, behind);
            row.row = values;
        }
        row.width += 2 * args_.shape.padding.w;
        row.channels = ceil_div(row.channels, lanes) * lanes;
        return row;
    }

    const bool of_images_;  // a row of the kernel is walked over as a pixel
    const RowsOf rows_;
    const int64_t row_width_;  // channels of a block of rows
    // Whether the input is loaded once, and what a column of the kernel sees begins some pixels further on;
    // else once for each of them, so that a run goes on from row to row. Short runs take longer.
    static constexpr int64_t kLeastColumns = 16;
    const bool one_plane_;
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
