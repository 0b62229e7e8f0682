// The output of a convolution and the gradient of its input: each pixel gathers its neighbours' products.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/conv_box.h"
#include "cpu/conv_rows.h"
#include "cpu/convolution.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/pointer.h"
#include "cpu/prefetch.h"
#include "cpu/streaming.h"
#include "cpu/workspace.h"

namespace fastres::cpu {
namespace {

// One axis of the kernel: which pixel of the input meets which of its entries.
struct Tap {
    int64_t offset;  // of the input's pixel, from step * (the grid's pixel)
    int64_t kernel;
};

struct TapAxis {
    int64_t step;           // input pixels from one pixel of the grid to the next
    std::vector<Tap> taps;  // by offset

    int64_t first() const { return taps.front().offset; }
    int64_t span() const { return taps.back().offset - taps.front().offset + 1; }
    // A single tap skips the pixels between.
    int64_t load_step() const { return taps.size() == 1 ? step : 1; }
    int64_t patch_step() const { return taps.size() == 1 ? 1 : step; }
    int64_t patch(int64_t grid) const { return (grid - 1) * patch_step() + span(); }
    bool consecutive() const { return span() == static_cast<int64_t>(taps.size()); }
};

// A grid of output pixels, evenly spread, of which each is
//   output[n] = sum over taps and k of input[step * pixel + tap.offset][k] * weight[k][n].
struct Gather {
    int64_t batch;
    Dtype dtype;
    ConvOperand input;
    int64_t in_channels;
    Axes in;
    const float* bias;
    const void* residual;
    bool relu;
    void* output;
    bn_math::Moments<double>* moments;
    int64_t out_channels;
    Axes out;
    Axes grid, grid_first, grid_step;  // pixels of the output
    TapAxis rows, columns;
    ConvWeight weight;
    int64_t k_stride, n_stride;
};

class GatherLoop {
  public:
    GatherLoop(const Gather& args, const ThreadPool& pool)
        : args_(args),
          pool_(pool),
          kernels_(*convolution_kernels(args.dtype)),
          taps_(static_cast<int64_t>(args.rows.taps.size() * args.columns.taps.size())),
          k_words_(ceil_div(args.in_channels, kernels_.pack)),
          k_block_(block_of_k()),
          n_blocks_(ceil_div(args.out_channels, kernels_.block)),
          stream_(
              streams(args.output, args.batch * args.out.h * args.out.w * pixel_bytes(), pixel_bytes())) {}

    void run() {
        if (args_.batch * args_.grid.h * args_.grid.w == 0) return;
        static thread_local Workspace packed;
        float* weight = packed.floats(n_blocks_ * taps_ * k_words_ * kernels_.block);
        pool_.for_each(n_blocks_, [&](int64_t n_block) { pack(n_block, weight); });

        const Boxes boxes(args_.batch, args_.grid, pixels_of_box());
        const int64_t chunks = chunks_of(boxes.count());
        std::vector<Moments> moments(args_.moments ? boxes.count() * args_.out_channels : 0);
        pool_.for_each(boxes.count() * chunks, [&](int64_t task) {
            static thread_local Workspace workspace;
            const int64_t box = task / chunks;
            Prefetch prefetch;
            if (task % chunks == chunks - 1 && box + 1 < boxes.count()) fetch(boxes[box + 1], prefetch);
            gather(boxes[box], part(n_blocks_, chunks, task % chunks), weight, workspace,
                   args_.moments ? moments.data() + box * args_.out_channels : nullptr, prefetch);
        });
        if (args_.moments) merge(moments, boxes.count());
    }

  private:
    using Moments = bn_math::Moments<double>;

    // Smaller boxes only where there would be too little for each thread, however the channels are cut.
    int64_t pixels_of_box() const {
        constexpr int64_t usual = 200, least = 28;
        const int64_t pixels = args_.batch * args_.grid.h * args_.grid.w;
        const int64_t boxes_wanted = ceil_div(pool_.threads(), n_blocks_);
        return std::clamp(pixels / boxes_wanted, least, usual);
    }

    // A box's input is loaded again for each chunk of output channels: more than the caches ask for pay
    // where threads would idle.
    int64_t chunks_of(int64_t boxes) const {
        constexpr int64_t most_blocks = 8;
        constexpr double most_idle = 0.2;
        const auto idle = [&](int64_t chunks) {
            const double rounds = static_cast<double>(boxes * chunks) / pool_.threads();
            return 1 - rounds / std::ceil(rounds);
        };
        const int64_t usual = ceil_div(n_blocks_, most_blocks);
        int64_t best = usual;
        for (int64_t chunks = usual; chunks <= n_blocks_ && idle(best) > most_idle; ++chunks)
            if (idle(chunks) < idle(best)) best = chunks;
        return best;
    }

    // In the order of the boxes, whoever computed them.
    void merge(const std::vector<Moments>& moments, int64_t boxes) const {
        const int64_t tasks = std::min(pool_.threads(), args_.out_channels);
        pool_.for_each(tasks, [&](int64_t task) {
            const Range channels = part(args_.out_channels, tasks, task);
            for (int64_t c = channels.begin; c < channels.end; ++c) args_.moments[c] = moments[c];
            for (int64_t box = 1; box < boxes; ++box)
                for (int64_t c = channels.begin; c < channels.end; ++c)
                    args_.moments[c] =
                        bn_math::merge(args_.moments[c], moments[box * args_.out_channels + c]);
        });
    }

    int64_t pixel_bytes() const { return args_.out_channels * size_of(args_.dtype); }

    int64_t block_of_k() const {
        // Of few pixels PyTorch's sums are the more exact ones, and the batch norm's errors hide less.
        constexpr int64_t few_pixels = 512;
        const bool exact =
            args_.dtype != Dtype::bf16 && args_.batch * args_.grid.h * args_.grid.w < few_pixels;
        const int64_t least_words = exact ? 16 : 32, most_words = 256, most_steps = exact ? 160 : 640;
        const int64_t most =
            std::max(least_words, std::min(most_words, most_steps / std::max<int64_t>(1, taps_)));
        return ceil_div(k_words_, ceil_div(k_words_, most));
    }

    // [n block][k block][tap][k word][n]
    void pack(int64_t n_block, float* packed) const {
        const int64_t block = kernels_.block, n = n_block * block;
        float* words = packed + n_block * taps_ * k_words_ * block;
        for (int64_t k = 0; k < k_words_; k += k_block_) {
            const int64_t k_words = std::min(k_block_, k_words_ - k), first = k * kernels_.pack;
            for (const Tap& row : args_.rows.taps) {
                for (const Tap& column : args_.columns.taps) {
                    const int64_t element = first * args_.k_stride + n * args_.n_stride +
                                            row.kernel * args_.weight.stride_h +
                                            column.kernel * args_.weight.stride_w;
                    kernels_.pack_weight(
                        {static_cast<char*>(args_.weight.data) + element * size_of(args_.weight.dtype),
                         args_.weight.dtype, std::min(k_words * kernels_.pack, args_.in_channels - first),
                         std::min(block, args_.out_channels - n), args_.k_stride, args_.n_stride},
                        words);
                    words += k_words * block;
                }
            }
        }
    }

    // All that a box's pixels gather, for some blocks of output channels.
    void gather(const Box& box, Range n_blocks, const float* weight, Workspace& workspace, Moments* moments,
                Prefetch& prefetch) const {
        const int64_t sums_stride = n_blocks.size() * kernels_.block;
        const Axes patch =
            taps_ ? Axes{args_.rows.patch(box.rows.size()), args_.columns.patch(box.columns.size())}
                  : Axes{0, 0};
        const int64_t sums_words = box.pixels() * sums_stride;
        const int64_t patch_words = box.images.size() * patch.h * patch.w * k_block_;
        float* sums = workspace.floats(sums_words + patch_words + 3 * sums_stride);
        float* words = sums + sums_words;
        float* about = words + patch_words;
        // Moments are taken about the first pixel: a mean far from zero costs no digits.
        if (moments) std::fill_n(about, 3 * sums_stride, 0.0f);
        const Sums of_box{sums, sums_stride, moments ? about : nullptr};
        if (taps_ == 0) std::fill_n(sums, sums_words, 0.0f);
        prefetch.spread(n_blocks.size() * box.images.size() * box.rows.size() * groups_of(box) *
                        ceil_div(k_words_, k_block_));
        int64_t k = 0;
        do {
            const int64_t k_words = std::min(k_block_, k_words_ - k);
            if (taps_ > 0) load_patch(box, patch, k * kernels_.pack, k_words, words);
            multiply(box, patch, n_blocks, k, k_words, weight, words, of_box, prefetch);
            k += k_words;
        } while (k < k_words_);
        if (!moments) return;
        const double count = static_cast<double>(box.pixels());
        const int64_t channel = n_blocks.begin * kernels_.block;
        const int64_t channels = std::min(n_blocks.end * kernels_.block, args_.out_channels) - channel;
        for (int64_t c = 0; c < channels; ++c)
            moments[channel + c] = bn_math::from_shifted_sums<double>(
                count, about[c], about[sums_stride + c], about[2 * sums_stride + c]);
    }

    // The input of a box, which is one stretch of memory but where rows are cut. Where a stride skips
    // pixels, most of that would be fetched in vain.
    void fetch(const Box& box, Prefetch& prefetch) const {
        if (taps_ == 0 || args_.rows.load_step() > 1 || args_.columns.load_step() > 1) return;
        const auto pixel = [&](int64_t image, int64_t row, int64_t column) {
            row = std::clamp<int64_t>(row * args_.rows.step + args_.rows.first(), 0, args_.in.h - 1);
            column =
                std::clamp<int64_t>(column * args_.columns.step + args_.columns.first(), 0, args_.in.w - 1);
            return (image * args_.in.h + row) * args_.in.w + column;
        };
        const int64_t begin = pixel(box.images.begin, box.rows.begin, box.columns.begin);
        const int64_t end = pixel(box.images.end - 1, box.rows.end - 1, box.columns.end - 1) + 1;
        const int64_t bytes = (end - begin) * args_.in_channels * size_of(args_.dtype);
        for (const void* operand : {args_.input.data, args_.input.bn_input})
            prefetch.add(at(operand, begin * args_.in_channels, args_.dtype), 1, bytes, bytes);
    }

    void load_patch(const Box& box, Axes patch, int64_t channel, int64_t k_words, float* words) const {
        PixelRow pixels{};
        pixels.column = box.columns.begin * args_.columns.step + args_.columns.first();
        pixels.column_step = args_.columns.load_step();
        pixels.columns = patch.w;
        pixels.first_channel = channel;
        pixels.channels = std::min(k_words * kernels_.pack, args_.in_channels - channel);
        const ImageRows rows{box.images, box.rows.begin * args_.rows.step + args_.rows.first(),
                             args_.rows.load_step(), patch.h};
        visit_rows(args_.input, args_.dtype, args_.in, args_.in_channels, rows, pixels,
                   [&](const PixelRow& row) {
                       kernels_.load_channels(row, words);
                       words += patch.w * k_words;
                   });
    }

    // Tiles that a row of a box is cut into.
    int64_t groups_of(const Box& box) const { return ceil_div(box.columns.size(), kernels_.tile_rows); }

    // What a box's products are added up in.
    struct Sums {
        float* data;  // [pixel][stride]
        int64_t stride;
        float* moments;  // shift, sum, sum of squares: [stride] each; or null
    };

    // Adds the products of some input channels; stores the sums after the last ones.
    void multiply(const Box& box, Axes patch, Range n_blocks, int64_t k, int64_t k_words,
                  const float* weight, const float* words, const Sums& sums, Prefetch& prefetch) const {
        // Taps that are neighbours in the patch are one run.
        const bool merged = taps_ > 0 && args_.columns.consecutive();
        std::vector<int64_t> runs;
        for (const Tap& row : args_.rows.taps) {
            for (const Tap& column : args_.columns.taps) {
                runs.push_back(
                    ((row.offset - args_.rows.first()) * patch.w + column.offset - args_.columns.first()) *
                    k_words);
                if (merged) break;
            }
        }
        MultiplyTile tile{};
        tile.row_stride = args_.columns.patch_step() * k_words;
        tile.step_stride = 1;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = merged ? k_words * static_cast<int64_t>(args_.columns.taps.size()) : k_words;
        tile.sums_stride = sums.stride;
        tile.add = k > 0;
        const bool last = k + k_words == k_words_;
        const int64_t block = kernels_.block, lanes = block / kernels_.vectors, width = box.columns.size();
        const int64_t groups = groups_of(box);
        const auto multiply_group = [&](int64_t n, int64_t image, int64_t row, int64_t group) {
            const Range columns = part(width, groups, group);
            const int64_t patch_row = image * patch.h + row * args_.rows.patch_step();
            const int64_t pixel = (image * box.rows.size() + row) * width + columns.begin;
            const int64_t channel = (n - n_blocks.begin) * block;
            tile.a = words + (patch_row * patch.w + columns.begin * args_.columns.patch_step()) * k_words;
            tile.b = weight + (n * k_words_ + k) * taps_ * block;
            tile.sums = sums.data + pixel * sums.stride + channel;
            tile.rows = static_cast<int>(columns.size());
            tile.vectors =
                static_cast<int>(ceil_div(std::min(block, args_.out_channels - n * block), lanes));
            prefetch.step();
            if (taps_ > 0) kernels_.multiply(tile);
            if (last)
                store(tile, n * block, box.images.begin + image, box.rows.begin + row,
                      box.columns.begin + columns.begin, sums.moments ? sums.moments + channel : nullptr,
                      pixel == 0);
        };
        // The weights of all blocks stay in the cache if they fit in; else one block's do.
        constexpr int64_t cached_words = 96 * 1024;
        const bool blocks_inside = n_blocks.size() * taps_ * k_words * block <= cached_words;
        const Range all = n_blocks;
        for (int64_t outer = all.begin; outer < (blocks_inside ? all.begin + 1 : all.end); ++outer)
            for (int64_t image = 0; image < box.images.size(); ++image)
                for (int64_t row = 0; row < box.rows.size(); ++row)
                    for (int64_t group = 0; group < groups; ++group)
                        for (int64_t n = outer; n < (blocks_inside ? all.end : outer + 1); ++n)
                            multiply_group(n, image, row, group);
    }

    // A tile's sums, from an image's row and column of the grid on.
    void store(const MultiplyTile& tile, int64_t channel, int64_t image, int64_t row, int64_t column,
               float* moments, bool first) const {
        const int64_t out_row = image * args_.out.h + args_.grid_first.h + row * args_.grid_step.h;
        const int64_t pixel = out_row * args_.out.w + args_.grid_first.w + column * args_.grid_step.w;
        const int64_t element = pixel * args_.out_channels + channel;
        StoreTile store{};
        store.sums = tile.sums;
        store.sums_stride = tile.sums_stride;
        store.rows = tile.rows;
        store.channels = std::min<int64_t>(kernels_.block, args_.out_channels - channel);
        store.output = at(args_.output, element, args_.dtype);
        store.residual = at(args_.residual, element, args_.dtype);
        store.row_stride = args_.grid_step.w * args_.out_channels;
        store.bias = args_.bias ? args_.bias + channel : nullptr;
        store.relu = args_.relu;
        store.stream = stream_;
        if (moments) {
            if (first) std::copy_n(tile.sums, store.channels, moments);
            store.shift = moments;
            store.sum = moments + tile.sums_stride;
            store.sum_of_squares = moments + 2 * tile.sums_stride;
        }
        kernels_.store(store);
    }

    const Gather& args_;
    const ThreadPool& pool_;
    const ConvKernels& kernels_;
    const int64_t taps_;
    const int64_t k_words_, k_block_;  // all input channels, and how many are multiplied at a time
    const int64_t n_blocks_;
    const bool stream_;
};

TapAxis forward_taps(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    TapAxis axis{stride, {}};
    for (int64_t k = 0; k < kernel; ++k) axis.taps.push_back({k * dilation - padding, k});
    return axis;
}

// Input pixel `phase` + i * stride gets from output pixel o where o * stride - padding + k * dilation is
// it.
TapAxis backward_taps(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t phase) {
    TapAxis axis{1, {}};
    for (int64_t k = kernel - 1; k >= 0; --k) {
        const int64_t distance = phase + padding - k * dilation;
        if (distance % stride == 0) axis.taps.push_back({distance / stride, k});
    }
    return axis;
}

// Where a pixel of the output sees one of the input, all are one long row.
void flatten(Gather& args) {
    const bool pointwise = args.rows.taps.size() == 1 && args.columns.taps.size() == 1 &&
                           args.rows.first() == 0 && args.columns.first() == 0 && args.rows.step == 1 &&
                           args.columns.step == 1;
    const bool whole = args.grid.h == args.out.h && args.grid.w == args.out.w && args.in.h == args.out.h &&
                       args.in.w == args.out.w;
    if (!pointwise || !whole) return;
    args.in = args.out = args.grid = {1, args.batch * args.in.h * args.in.w};
    args.batch = 1;
}

}  // namespace

void conv_forward(const ConvForward& args, const ThreadPool& pool) {
    const Conv2d& shape = args.shape;
    Gather gather{};
    gather.batch = shape.batch;
    gather.dtype = args.dtype;
    gather.input = args.input;
    gather.in_channels = shape.in_channels;
    gather.in = shape.in;
    gather.output = args.output;
    gather.out_channels = shape.out_channels;
    gather.out = gather.grid = shape.out;
    gather.grid_step = {1, 1};
    gather.bias = args.bias;
    gather.residual = args.residual;
    gather.relu = args.relu;
    gather.moments = args.moments;
    gather.rows = forward_taps(shape.kernel.h, shape.stride.h, shape.padding.h, shape.dilation.h);
    gather.columns = forward_taps(shape.kernel.w, shape.stride.w, shape.padding.w, shape.dilation.w);
    gather.weight = args.weight;
    gather.k_stride = args.weight.stride_in;
    gather.n_stride = args.weight.stride_out;
    flatten(gather);
    advise_huge_pages(args.output,
                      shape.batch * shape.out.h * shape.out.w * shape.out_channels * size_of(args.dtype));
    GatherLoop(gather, pool).run();
}

void conv_backward_input(const ConvBackwardInput& args, const ThreadPool& pool) {
    const Conv2d& shape = args.shape;
    Gather gather{};
    gather.dtype = args.dtype;
    gather.input = args.grad;
    gather.in_channels = shape.out_channels;
    gather.output = args.grad_input;
    gather.out_channels = shape.in_channels;
    gather.grid_step = shape.stride;
    gather.weight = args.weight;
    gather.k_stride = args.weight.stride_out;
    gather.n_stride = args.weight.stride_in;
    advise_huge_pages(args.grad_input,
                      shape.batch * shape.in.h * shape.in.w * shape.in_channels * size_of(args.dtype));
    // A stride spreads the output's pixels over the input; the pixels between them see other taps.
    for (int64_t h = 0; h < std::min(shape.stride.h, shape.in.h); ++h) {
        for (int64_t w = 0; w < std::min(shape.stride.w, shape.in.w); ++w) {
            gather.batch = shape.batch;
            gather.in = shape.out;
            gather.out = shape.in;
            gather.grid = {ceil_div(shape.in.h - h, shape.stride.h),
                           ceil_div(shape.in.w - w, shape.stride.w)};
            gather.grid_first = {h, w};
            gather.rows =
                backward_taps(shape.kernel.h, shape.stride.h, shape.padding.h, shape.dilation.h, h);
            gather.columns =
                backward_taps(shape.kernel.w, shape.stride.w, shape.padding.w, shape.dilation.w, w);
            flatten(gather);
            GatherLoop(gather, pool).run();
        }
    }
}

}  // namespace fastres::cpu
