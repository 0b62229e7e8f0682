// What the ways to the gradient of the weights have in common: a thread keeps the sums of some channels'
// weights in its cache while it walks over the pixels.
#pragma once

#include <algorithm>

#include "cpu/conv_box.h"
#include "cpu/conv_rows.h"
#include "cpu/convolution.h"
#include "cpu/isa.h"
#include "cpu/pointer.h"
#include "cpu/prefetch.h"
#include "cpu/workspace.h"

namespace fastres::cpu {

// A part of the weights, whose sums one thread keeps in its cache while it walks over the pixels. Of
// groups, the input's channels are those that the output's see.
struct Chunk {
    Range in_channels, out_channels;
};

class WeightGradTasks {
  protected:
    // Sums of `products` for each pair of channels.
    WeightGradTasks(const ConvBackwardWeight& args, const Conv2d& shape, int64_t products,
                    const ThreadPool& pool)
        : args_(args),
          shape_(shape),
          pool_(pool),
          kernels_(fitting(*convolution_kernels(args.dtype), shape.out_channels)),
          taps_(shape.kernel.h * shape.kernel.w),
          products_(products) {
        cut();
    }

    // The rounding errors of a box's sums grow with its pixels, and average out over many boxes.
    int64_t size_of_box(int64_t usual) const {
        constexpr int64_t many = 8192, few = 2048;
        const int64_t pixels = shape_.batch * shape_.out.h * shape_.out.w;
        if (pixels >= many) return usual;
        return pixels >= few ? usual / 2 : usual / 4;
    }

    // Calls sum(boxes, range, chunk, words, sums): sums[product][in channel][out channel] over some boxes,
    // in `words` of memory; and store(chunk, sums) when they are complete.
    template <class Sum, class Store>
    void run(const Boxes& boxes, int64_t words_of_sum, const Sum& sum, const Store& store) const {
        const int64_t chunks = this->chunks();
        const int64_t parts = std::max<int64_t>(1, std::min(boxes.count(), pool_.threads() / chunks));
        const int64_t chunk_words = products_ * in_chunk_ * out_chunk_;
        static thread_local Workspace partial;
        float* partial_sums = parts > 1 ? partial.floats(parts * chunks * chunk_words) : nullptr;
        pool_.for_each(chunks * parts, [&](int64_t task) {
            static thread_local Workspace workspace;
            const Chunk chunk = chunk_of(task / parts);
            float* words = workspace.floats(chunk_words + words_of_sum);
            float* sums = partial_sums ? partial_sums + task * chunk_words : words;
            const Range range = part(boxes.count(), parts, task % parts);
            if (range.size() == 0) std::fill_n(sums, chunk_words, 0.0f);
            sum(boxes, range, chunk, words + chunk_words, sums);
            if (kernels_.release) kernels_.release();
            if (!partial_sums) store(chunk, sums);
        });
        if (!partial_sums) return;
        pool_.for_each(chunks, [&](int64_t index) {
            float* sums = partial_sums + index * parts * chunk_words;
            for (int64_t p = 1; p < parts; ++p)
                for (int64_t i = 0; i < chunk_words; ++i) sums[i] += sums[p * chunk_words + i];
            store(chunk_of(index), sums);
        });
    }

    // The operands of a box: a piece of each pixel's channels, or all as one.
    void fetch(const Box& box, const Chunk& chunk, Prefetch& prefetch) const {
        const int64_t value = size_of(args_.dtype);
        const auto add = [&](const ConvOperand& operand, Axes size, int64_t channels, Range wanted,
                             Axes step) {
            const auto pixel = [&](int64_t image, int64_t row, int64_t column) {
                return (image * size.h + std::min(row * step.h, size.h - 1)) * size.w +
                       std::min(column * step.w, size.w - 1);
            };
            const int64_t begin = pixel(box.images.begin, box.rows.begin, box.columns.begin);
            const int64_t end = pixel(box.images.end - 1, box.rows.end - 1, box.columns.end - 1) + 1;
            const bool whole = wanted.size() == channels;
            for (const void* data : {operand.data, operand.bn_input})
                prefetch.add(at(data, begin * channels + wanted.begin, args_.dtype),
                             whole ? 1 : end - begin, (whole ? end - begin : 1) * wanted.size() * value,
                             channels * value);
        };
        add(args_.grad, shape_.out, shape_.out_channels, chunk.out_channels, {1, 1});
        // Where a stride skips pixels, most of that would be fetched in vain.
        if (shape_.stride.h > shape_.kernel.h || shape_.stride.w > shape_.kernel.w) return;
        // Images are small beside the gradient.
        if (shape_.in_channels != args_.shape.in_channels) return;
        add(args_.input, shape_.in, shape_.in_channels, chunk.in_channels, shape_.stride);
    }

    // From sums[tap][in channel of the group][out channel], or of sums[tap][out channel][in channel].
    enum class RowsOf { in_channels, out_channels };
    void store(const Chunk& chunk, const float* sums, RowsOf rows) const {
        const Range in = grouped() ? Range{0, in_chunk_} : chunk.in_channels;  // of the weight
        const ConvWeight& weight = args_.grad_weight;
        const bool of_in = rows == RowsOf::in_channels;
        for (int64_t kh = 0; kh < shape_.kernel.h; ++kh) {
            for (int64_t kw = 0; kw < shape_.kernel.w; ++kw) {
                const int64_t tap = kh * shape_.kernel.w + kw;
                const int64_t element = in.begin * weight.stride_in +
                                        chunk.out_channels.begin * weight.stride_out +
                                        kh * weight.stride_h + kw * weight.stride_w;
                WeightBlock block{};
                block.data = static_cast<char*>(weight.data) + element * size_of(weight.dtype);
                block.dtype = weight.dtype;
                block.k = of_in ? in.size() : chunk.out_channels.size();
                block.n = of_in ? chunk.out_channels.size() : in.size();
                block.k_stride = of_in ? weight.stride_in : weight.stride_out;
                block.n_stride = of_in ? weight.stride_out : weight.stride_in;
                kernels_.unpack_weight(sums + tap * in_chunk_ * out_chunk_, of_in ? out_chunk_ : in_chunk_,
                                       block);
            }
        }
    }

    bool grouped() const { return shape_.groups > 1; }
    int64_t chunks() const { return in_chunks_ * out_chunks_; }

    const ConvBackwardWeight& args_;
    const Conv2d shape_;
    const ThreadPool& pool_;
    const ConvKernels& kernels_;
    const int64_t taps_, products_;
    int64_t in_chunk_ = 0, out_chunk_ = 0;  // channels of a sum

  private:
    void cut() {
        constexpr int64_t most_words = 80 * 1024;
        const int64_t block = kernels_.block;
        if (grouped()) {
            in_chunks_ = 1;
            out_chunks_ = ceil_div(shape_.out_channels, block);
            in_chunk_ = shape_.in_channels / shape_.groups;
            out_chunk_ = block;
            return;
        }
        const auto blocks = [&](int64_t channels) { return ceil_div(channels, block); };
        const int64_t most_blocks = std::max<int64_t>(1, most_words / (products_ * block * block));
        // As square as can be: each operand is loaded once for each chunk of the other's channels.
        int64_t out_blocks = std::min(blocks(shape_.out_channels), most_blocks);
        int64_t in_blocks = std::min(blocks(shape_.in_channels), most_blocks);
        while (in_blocks * out_blocks > most_blocks)
            (in_blocks >= out_blocks ? in_blocks : out_blocks) -= 1;
        in_chunks_ = ceil_div(blocks(shape_.in_channels), in_blocks);
        out_chunks_ = ceil_div(blocks(shape_.out_channels), out_blocks);
        in_chunk_ = in_blocks * block;
        out_chunk_ = out_blocks * block;
    }

    Chunk chunk_of(int64_t index) const {
        const Range in = part(shape_.in_channels, in_chunks_, index / out_chunks_, kernels_.block);
        const Range out = part(shape_.out_channels, out_chunks_, index % out_chunks_, kernels_.block);
        return {grouped() ? out : in, out};
    }

    int64_t in_chunks_ = 0, out_chunks_ = 0;
};

// Of more than one group: see conv_groups_weight_grad.cpp.
void weight_grad_by_groups(const ConvBackwardWeight& args, const ThreadPool& pool);
// See conv_winograd_weight_grad.cpp.
void weight_grad_by_winograd(const ConvBackwardWeight& args, const ThreadPool& pool);

}  // namespace fastres::cpu
