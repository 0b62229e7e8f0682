// What the output of a convolution and the gradient of its input have in common: each pixel gathers its
// neighbours' products. How these are multiplied is left to conv_gather.cpp, conv_groups.cpp and
// conv_winograd.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/conv_box.h"
#include "cpu/conv_rows.h"
#include "cpu/convolution.h"
#include "cpu/isa.h"
#include "cpu/pointer.h"
#include "cpu/streaming.h"
#include "cpu/workspace.h"

namespace fastres::cpu {

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
    // What so many pixels of the grid see, in whole steps.
    int64_t patch(int64_t grid) const { return (grid - 1 + ceil_div(span(), patch_step())) * patch_step(); }
    RowOrder order(int64_t grid) const {
        return rows_seen(grid, step, span(), static_cast<int64_t>(taps.size()));
    }
    bool consecutive() const { return span() == static_cast<int64_t>(taps.size()); }
};

// A grid of output pixels, evenly spread, of which each is
//   output[n] = sum over taps and k of input[step * pixel + tap.offset][k] * weight[k][n].
struct Gather {
    int64_t batch;
    Dtype dtype;
    ConvOperand input;
    int64_t in_channels, groups;
    Axes in;
    const float *scale, *shift;
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
    const float* packed;  // the weight, as pack left it; or null
    bool one_order;       // of the packed weight, whatever the number of pixels
};

// Sums of pixels that are neighbours in a row.
struct PixelSums {
    const float* data;  // [pixel][stride]
    int64_t stride;
    int pixels;
};

// Boxes of pixels times blocks of output channels, shared out between the threads.
class GatherLoop {
  public:
    virtual ~GatherLoop() = default;
    virtual void run() = 0;
    virtual int64_t packed_floats() const = 0;
    virtual void pack(float* packed) const = 0;

  protected:
    using Moments = bn_math::Moments<double>;

    GatherLoop(const Gather& args, const ThreadPool& pool)
        : args_(args),
          pool_(pool),
          kernels_(fitting(*convolution_kernels(args.dtype), args.out_channels)),
          taps_(static_cast<int64_t>(args.rows.taps.size() * args.columns.taps.size())),
          k_words_(ceil_div(args.in_channels, kernels_.pack)),
          n_blocks_(ceil_div(args.out_channels, kernels_.block)),
          stream_(
              streams(args.output, args.batch * args.out.h * args.out.w * pixel_bytes(), pixel_bytes())) {}

    int64_t pixels() const { return args_.batch * args_.grid.h * args_.grid.w; }

    const float* packed_weight() const {
        if (args_.packed) return args_.packed;
        static thread_local Workspace workspace;
        float* packed = workspace.floats(packed_floats());
        pack(packed);
        return packed;
    }

    // Calls gather(index of the box, its blocks of output channels, where its moments go) for all of them.
    template <class GatherBox>
    void for_each_box(const Boxes& boxes, const GatherBox& gather) const {
        const int64_t chunks = chunks_of(boxes.count());
        std::vector<Moments> moments(args_.moments ? boxes.count() * args_.out_channels : 0);
        pool_.for_each(boxes.count() * chunks, [&](int64_t task) {
            const int64_t box = task / chunks;
            gather(box, part(n_blocks_, chunks, task % chunks),
                   args_.moments ? moments.data() + box * args_.out_channels : nullptr);
            if (kernels_.release) kernels_.release();
        });
        if (args_.moments) merge(moments, boxes.count());
    }

    // The weights of one tap: words[k][block], of so many input channels and of a block of output channels.
    void pack_tap(const Tap& row, const Tap& column, int64_t k, int64_t channels, int64_t n_block,
                  float* words) const {
        const int64_t n = n_block * kernels_.block;
        const int64_t element = k * args_.k_stride + n * args_.n_stride +
                                row.kernel * args_.weight.stride_h + column.kernel * args_.weight.stride_w;
        kernels_.pack_weight(
            {static_cast<char*>(args_.weight.data) + element * size_of(args_.weight.dtype),
             args_.weight.dtype, channels, std::min<int64_t>(kernels_.block, args_.out_channels - n),
             args_.k_stride, args_.n_stride},
            words);
    }

    // Pixels of the input that a box's of one image see.
    Axes patch_of(const Box& box) const {
        if (taps_ == 0) return {0, 0};
        return {args_.rows.order(box.rows.size()).count(), args_.columns.patch(box.columns.size())};
    }

    // Words of a patch from where a pixel of the grid begins to what each tap sees of it; or, where taps
    // that are neighbours are `merged` into one run, to what the first of each row sees.
    std::vector<int64_t> runs_of(const Box& box, int64_t pixel_stride, bool merged) const {
        std::vector<int64_t> runs;
        const int64_t width = patch_of(box).w;
        for (const Tap& row : args_.rows.taps) {
            const int64_t place = args_.rows.order(box.rows.size()).place(row.offset - args_.rows.first());
            for (const Tap& column : args_.columns.taps) {
                runs.push_back((place * width + column.offset - args_.columns.first()) * pixel_stride);
                if (merged) break;
            }
        }
        return runs;
    }

    // words[image][row][column][channel]: what a box's pixels see, the rows by phases.
    void load_patch(const Box& box, int64_t channel, int64_t k_words, float* words) const {
        load_patch(box.images, box.rows.begin, box.columns.begin, args_.rows.order(box.rows.size()),
                   patch_of(box).w, channel, k_words, words);
    }

    // The same of what the grid's pixels from `row` and `column` on see.
    void load_patch(Range images, int64_t row, int64_t column, const RowOrder& order, int64_t columns,
                    int64_t channel, int64_t k_words, float* words) const {
        PixelRow pixels{};
        pixels.column = column * args_.columns.step + args_.columns.first();
        pixels.column_step = args_.columns.load_step();
        pixels.columns = columns;
        pixels.first_channel = channel;
        pixels.channels = std::min(k_words * kernels_.pack, args_.in_channels - channel);
        load_rows(kernels_, args_.input, args_.dtype, args_.in, args_.in_channels,
                  {images, row * args_.rows.step + args_.rows.first(), order}, pixels, words);
    }

    // From the first of the input's pixels that a box sees to the last, and what lies between.
    Range seen_pixels(const Box& box) const {
        return pixels_of(box, [&](int64_t image, int64_t row, int64_t column) {
            row = std::clamp<int64_t>(row * args_.rows.step + args_.rows.first(), 0, args_.in.h - 1);
            column =
                std::clamp<int64_t>(column * args_.columns.step + args_.columns.first(), 0, args_.in.w - 1);
            return (image * args_.in.h + row) * args_.in.w + column;
        });
    }

    // The same of the output's pixels that it makes.
    Range made_pixels(const Box& box) const {
        return pixels_of(
            box, [&](int64_t image, int64_t row, int64_t column) { return out_pixel(image, row, column); });
    }

    // Where the grid's pixel is in the output.
    int64_t out_pixel(int64_t image, int64_t row, int64_t column) const {
        const int64_t out_row = image * args_.out.h + args_.grid_first.h + row * args_.grid_step.h;
        return out_row * args_.out.w + args_.grid_first.w + column * args_.grid_step.w;
    }

    // Of neighbours in a row, from that pixel of the output on.
    void store(const PixelSums& sums, int64_t channel, int64_t pixel, float* moments,
               int64_t moments_stride, bool first) const {
        const int64_t element = pixel * args_.out_channels + channel;
        StoreTile store{};
        store.sums = sums.data;
        store.sums_stride = sums.stride;
        store.rows = sums.pixels;
        store.channels = std::min<int64_t>(kernels_.block, args_.out_channels - channel);
        store.output = at(args_.output, element, args_.dtype);
        store.residual = at(args_.residual, element, args_.dtype);
        store.row_stride = args_.grid_step.w * args_.out_channels;
        store.scale = args_.scale ? args_.scale + channel : nullptr;
        store.shift = args_.shift ? args_.shift + channel : nullptr;
        store.relu = args_.relu;
        store.stream = stream_;
        if (moments) {
            if (first) std::copy_n(sums.data, store.channels, moments);
            store.about = moments;
            store.sum = moments + moments_stride;
            store.sum_of_squares = moments + 2 * moments_stride;
        }
        kernels_.store(store);
    }

    // From what the moments are about, sum and sum of squares, `stride` floats each, of so many pixels.
    void set_moments(Range n_blocks, int64_t pixels, const float* about, int64_t stride,
                     Moments* moments) const {
        const int64_t channel = n_blocks.begin * kernels_.block;
        const int64_t channels = std::min(n_blocks.end * kernels_.block, args_.out_channels) - channel;
        for (int64_t c = 0; c < channels; ++c)
            moments[channel + c] = bn_math::from_shifted_sums<double>(
                static_cast<double>(pixels), about[c], about[stride + c], about[2 * stride + c]);
    }

    const Gather& args_;
    const ThreadPool& pool_;
    const ConvKernels& kernels_;
    const int64_t taps_;
    const int64_t k_words_;  // of all input channels
    const int64_t n_blocks_;

  private:
    template <class Pixel>
    static Range pixels_of(const Box& box, const Pixel& pixel) {
        return {pixel(box.images.begin, box.rows.begin, box.columns.begin),
                pixel(box.images.end - 1, box.rows.end - 1, box.columns.end - 1) + 1};
    }

    int64_t pixel_bytes() const { return args_.out_channels * size_of(args_.dtype); }

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

    const bool stream_;
};

// The gradient of a pointwise convolution's input, some pixels at a time by the thread that calls: beside
// that of its weight, which is then made of the very values that this has loaded.
class InputGradByBox {
  public:
    InputGradByBox(const ConvBackwardInput& args, const ThreadPool& pool);
    ~InputGradByBox();

    // Whether the convolution is pointwise, and the values are there as a tensor would hold them.
    bool keeps_values() const;
    // Before the first box.
    void begin();
    // Of pixels of all images, as one row; returns the gradient of the output, [pixel][out channel], which
    // stays there until the thread's next call.
    const float* operator()(Range pixels) const;

  private:
    struct Loop;
    const ConvBackwardInput& args_;
    std::unique_ptr<Loop> loop_;
    const float* weight_ = nullptr;
};

// Whether multiplying transformed tiles is the faster way; see conv_winograd.cpp.
bool winograd_pays(const Gather& args);
std::unique_ptr<GatherLoop> winograd_loop(const Gather& args, const ThreadPool& pool);
// Of more than one group.
std::unique_ptr<GatherLoop> group_loop(const Gather& args, const ThreadPool& pool);

}  // namespace fastres::cpu
