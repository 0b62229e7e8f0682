// The gradient of a grouped convolution's weights: a block of the output's channels with the same of the
// input's, vector by vector.
#include "cpu/conv_groups.h"
#include "cpu/conv_weight_grad.h"

namespace fastres::cpu {
namespace {

class GroupLoop : WeightGradTasks {
  public:
    GroupLoop(const ConvBackwardWeight& args, const ThreadPool& pool)
        : WeightGradTasks(args, args.shape, args.shape.kernel.h * args.shape.kernel.w, pool),
          lanes_(lanes_of(kernels_)),
          vectors_(kernels_.vectors),
          channels_(args.shape.in_channels / args.shape.groups),
          table_(group_words(kernels_, channels_, channels_)) {}

    void run() const {
        const Boxes boxes(shape_.batch, shape_.out, size_of_box(224));
        WeightGradTasks::run(
            boxes, words_of_operands(boxes.largest()),
            [&](const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) {
                for (int64_t index = range.begin; index < range.end; ++index) {
                    const Box box = boxes[index];
                    Prefetch prefetch;
                    if (index + 1 < range.end) fetch(boxes[index + 1], chunk, prefetch);
                    prefetch.spread(vectors_ * shape_.kernel.h);
                    load(box, chunk, words);
                    multiply(box, chunk, words, index > range.begin, sums, prefetch);
                }
            },
            [&](const Chunk& chunk, const float* sums) { store(chunk, sums, RowsOf::in_channels); });
    }

  private:
    // How a box's rows of the input are loaded: steps of what some entries of the kernel see, of which each
    // begins with a step of one of these copies.
    struct Rows {
        int64_t count, copies, columns;   // of the patch
        int64_t column_step, first_step;  // input pixels from one column, or one copy's first, to the next
        int64_t steps;                    // of a copy's row
        int64_t stride;                   // steps from one that a step of the gradient meets to the next
        bool copy_a_tap;
    };

    Rows rows_of(const Box& box) const {
        const int64_t count =
            (box.rows.size() - 1) * shape_.stride.h + (shape_.kernel.h - 1) * shape_.dilation.h + 1;
        const int64_t width = box.columns.size(), reach = (shape_.kernel.w - 1) * shape_.dilation.w;
        // A pixel for itself: all of them once.
        if (kernels_.pack == 1) {
            const int64_t columns = (width - 1) * shape_.stride.w + reach + 1;
            return {count, 1, columns, 1, 1, columns, shape_.stride.w, false};
        }
        // Pairs that begin with an even one, and with an odd one; nothing may stand beside the last of an
        // odd number.
        if (shape_.stride.w == 1 && width % kernels_.pack == 0 && reach > 0) {
            const int64_t columns = width + reach / kernels_.pack * kernels_.pack;
            return {count, kernels_.pack, columns, 1, 1, columns / kernels_.pack, 1, false};
        }
        return {count,
                shape_.kernel.w,
                width,
                shape_.stride.w,
                shape_.dilation.w,
                ceil_div(width, kernels_.pack),
                1,
                true};
    }

    // Words of the input where an entry of the kernel begins, from where its row does.
    int64_t word_of_tap(const Rows& rows, int64_t kw, int64_t copy_words) const {
        if (rows.copy_a_tap) return kw * copy_words;
        const int64_t distance = kw * shape_.dilation.w;
        return distance % rows.copies * copy_words + distance / rows.copies * lanes_;
    }

    int64_t steps(const Box& box) const { return ceil_div(box.columns.size(), kernels_.pack); }
    int64_t grad_vector(const Box& box) const {
        return box.images.size() * box.rows.size() * steps(box) * lanes_;
    }
    int64_t input_vector(const Box& box, const Rows& rows) const {
        return box.images.size() * rows.count * rows.steps * lanes_;
    }

    int64_t words_of_operands(const Box& largest) const {
        // An odd number of columns may take more than an even one that is larger, and the other way round.
        Box narrower = largest;
        --narrower.columns.end;
        int64_t most = 0;
        for (const Box& box : {largest, narrower}) {
            const Rows rows = rows_of(box);
            most = std::max(most, grad_vector(box) + rows.copies * input_vector(box, rows));
        }
        return vectors_ * most;
    }

    // grad[vector][image][row][step][lane], input[copy][vector][image][patch row][step][lane]
    void load(const Box& box, const Chunk& chunk, float* words) const {
        float* input = words + vectors_ * grad_vector(box);
        PixelRow pixels{};
        pixels.first_channel = chunk.out_channels.begin;
        pixels.channels = chunk.out_channels.size();
        pixels.column = box.columns.begin;
        pixels.column_step = 1;
        pixels.columns = box.columns.size();
        visit_rows(args_.grad, args_.dtype, shape_.out, shape_.out_channels,
                   {box.images, box.rows.begin, {box.rows.size()}}, pixels, [&](const PixelRow& row) {
                       kernels_.load_pixels(row, lanes_, words, grad_vector(box));
                       words += steps(box) * lanes_;
                   });
        const Rows rows = rows_of(box);
        const int64_t vector = input_vector(box, rows);
        pixels.column_step = rows.column_step;
        pixels.columns = rows.columns;
        for (int64_t copy = 0; copy < rows.copies; ++copy) {
            pixels.column = box.columns.begin * shape_.stride.w - shape_.padding.w + copy * rows.first_step;
            float* copied = input + copy * vectors_ * vector;
            visit_rows(args_.input, args_.dtype, shape_.in, shape_.in_channels,
                       {box.images, box.rows.begin * shape_.stride.h - shape_.padding.h, {rows.count}},
                       pixels, [&](const PixelRow& row) {
                           kernels_.load_pixels(row, lanes_, copied, vector);
                           copied += rows.steps * lanes_;
                       });
        }
    }

    // sums[tap][channel of the group][out channel]
    void multiply(const Box& box, const Chunk& chunk, const float* words, bool add, float* sums,
                  Prefetch& prefetch) const {
        const Rows rows = rows_of(box);
        const int64_t vector = input_vector(box, rows);
        const float* input = words + vectors_ * grad_vector(box);
        std::vector<int64_t> runs, taps;
        for (int64_t image = 0; image < box.images.size(); ++image)
            for (int64_t row = 0; row < box.rows.size(); ++row)
                runs.push_back((image * rows.count + row * shape_.stride.h) * rows.steps * lanes_);
        for (int64_t kw = 0; kw < shape_.kernel.w; ++kw)
            taps.push_back(word_of_tap(rows, kw, vectors_ * vector));
        MultiplyGroupPixels tile{};
        tile.input_stride = rows.stride * lanes_;
        tile.vector_stride = vector;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = steps(box);
        tile.taps = taps.data();
        tile.tap_count = shape_.kernel.w;
        tile.channels = channels_;
        tile.words = table_.data();
        tile.sums_stride = out_chunk_;
        tile.add = add;
        const int64_t vectors = cpu::vectors_of(kernels_, chunk.out_channels.size());
        for (int64_t v = 0; v < vectors; ++v) {
            for (int64_t kh = 0; kh < shape_.kernel.h; ++kh) {
                tile.grad = words + v * grad_vector(box);
                tile.input = input + first_of_group(v * lanes_, channels_) / lanes_ * vector +
                             kh * shape_.dilation.h * rows.steps * lanes_;
                tile.sums = sums + kh * shape_.kernel.w * in_chunk_ * out_chunk_ + v * lanes_;
                prefetch.step();
                kernels_.multiply_group_pixels(tile);
            }
        }
    }

    const int64_t lanes_, vectors_;  // of a block
    const int64_t channels_;         // of a group
    const std::vector<int32_t> table_;
};

}  // namespace

void weight_grad_by_groups(const ConvBackwardWeight& args, const ThreadPool& pool) {
    GroupLoop(args, pool).run();
}

}  // namespace fastres::cpu
