// 3x3 convolutions by Winograd's F(2x2, 3x3): 2x2 pixels take 16 products for each pair of channels instead
// of 36, and their sums are shorter by 9, so that float's rounding errors are the smaller ones as well.
// What is transformed would not survive a rounding to bf16, so that pairs of bf16 are not multiplied this
// way.
//
// Reference: Lavin and Gray 2015 (arXiv:1509.09308), section 4.1.
#include "cpu/conv_winograd.h"

#include <atomic>

#include "cpu/conv_gather.h"
#include "cpu/conv_tiles.h"

namespace fastres::cpu {
namespace {

std::atomic<WinogradUse> use{WinogradUse::where_faster};

class WinogradLoop final : public GatherLoop {
  public:
    WinogradLoop(const Gather& args, const ThreadPool& pool)
        : GatherLoop(args, pool), block_(kernels_.block), channels_(args.in_channels) {}

    int64_t packed_floats() const override { return n_blocks_ * kTileProducts * channels_ * block_; }

    void pack(float* packed) const override {
        const int64_t parts = ceil_div(channels_, kChannelsOfPart);
        pool_.for_each(n_blocks_ * parts, [&](int64_t task) {
            pack(task / parts, part(channels_, parts, task % parts), packed);
        });
    }

    void run() override {
        const float* weight = packed_weight();
        const Boxes boxes(args_.batch, tiles_of(args_.grid), kTilesOfBox);
        for_each_box(boxes, [&](int64_t index, Range n_blocks, Moments* moments) {
            gather(boxes[index], n_blocks, weight, moments);
        });
    }

  private:
    static constexpr int64_t kTilesOfBox = 56, kChannelsOfPart = 64;
    // The rounding errors of a sum grow with the length of its parts.
    static constexpr int64_t kMostSteps = 256;

    // weight[n block][product][channel][n]
    void pack(int64_t n_block, Range channels, float* weight) const {
        static thread_local Workspace workspace;
        const int64_t tap_words = channels.size() * block_;
        float* taps = workspace.floats(9 * tap_words);
        float* words = taps;
        for (const Tap& row : args_.rows.taps) {
            for (const Tap& column : args_.columns.taps) {
                pack_tap(row, column, channels.begin, channels.size(), n_block, words);
                words += tap_words;
            }
        }
        const int64_t product = channels_ * block_;
        kernels_.transform_weight({taps, 3 * tap_words, tap_words,
                                   weight + (n_block * kTileProducts * channels_ + channels.begin) * block_,
                                   kTileSide * product, product, tap_words});
    }

    // The memory of a box of `tiles` tiles.
    struct Words {
        float* input;     // [product][tile][channel]
        float* products;  // [product][tile][n]
        float* sums;      // [row of a tile][pixel][n], of one row of tiles
        float* about;     // shift, sum and sum of squares: [3][channel of the blocks]
        float* patch;
    };

    void gather(const Box& box, Range n_blocks, const float* weight, Moments* moments) const {
        static thread_local Workspace workspace;
        const int64_t tiles = box.pixels(), stride = n_blocks.size() * block_;
        const Axes patch = in_pixels_of(box);
        const int64_t sizes[] = {kTileProducts * tiles * channels_, kTileProducts * tiles * block_,
                                 kTileStep * kTileStep * box.columns.size() * block_, 3 * stride,
                                 box.images.size() * patch.h * patch.w * kChannelsOfPart};
        int64_t total = 0;
        for (int64_t size : sizes) total += size;
        Words words{};
        words.input = workspace.floats(total);
        words.products = words.input + sizes[0];
        words.sums = words.products + sizes[1];
        words.about = words.sums + sizes[2];
        words.patch = words.about + sizes[3];
        load(box, patch, words);
        if (moments) std::fill_n(words.about, 3 * stride, 0.0f);
        for (int64_t n = n_blocks.begin; n < n_blocks.end; ++n) {
            multiply(tiles, weight + n * kTileProducts * channels_ * block_, vectors_of(n), words);
            float* about = moments ? words.about + (n - n_blocks.begin) * block_ : nullptr;
            store_block(box, n, words, about, stride);
        }
        if (!moments) return;
        const int64_t pixels =
            box.images.size() * pixels_of(box.rows, args_.grid.h) * pixels_of(box.columns, args_.grid.w);
        set_moments(n_blocks, pixels, words.about, stride, moments);
    }

    static int64_t pixels_of(Range tiles, int64_t size) {
        return std::min(kTileStep * tiles.end, size) - kTileStep * tiles.begin;
    }

    int vectors_of(int64_t n_block) const {
        return cpu::vectors_of(kernels_, args_.out_channels - n_block * block_);
    }

    void load(const Box& box, Axes patch, const Words& words) const {
        const int64_t product = box.pixels() * channels_;
        for (int64_t k = 0; k < channels_; k += kChannelsOfPart) {
            const int64_t channels = std::min(kChannelsOfPart, channels_ - k);
            load_patch(box.images, kTileStep * box.rows.begin, kTileStep * box.columns.begin, {patch.h},
                       patch.w, k, channels, words.patch);
            transform_tiles(box, patch, kernels_.transform_input,
                            {words.patch, patch.w * channels, channels, words.input + k,
                             kTileSide * product, product, channels},
                            channels_);
        }
    }

    void multiply(int64_t tiles, const float* weight, int vectors, const Words& words) const {
        const int64_t run = 0, groups = ceil_div(tiles, kernels_.tile_rows);
        MultiplyTile tile{};
        tile.row_stride = channels_;
        tile.step_stride = 1;
        tile.runs = &run;
        tile.run_count = 1;
        tile.sums_stride = block_;
        tile.vectors = vectors;
        for (int64_t product = 0; product < kTileProducts; ++product) {
            for (int64_t k = 0; k < channels_; k += kMostSteps) {
                tile.steps = std::min(kMostSteps, channels_ - k);
                tile.add = k > 0;
                tile.b = weight + (product * channels_ + k) * block_;
                for (int64_t group = 0; group < groups; ++group) {
                    const Range rows = part(tiles, groups, group);
                    const int64_t first = product * tiles + rows.begin;
                    tile.a = words.input + first * channels_ + k;
                    tile.sums = words.products + first * block_;
                    tile.rows = static_cast<int>(rows.size());
                    kernels_.multiply(tile);
                }
            }
        }
    }

    void store_block(const Box& box, int64_t n_block, const Words& words, float* about,
                     int64_t about_stride) const {
        const int64_t product = box.pixels() * block_, columns = box.columns.size();
        const int64_t count = vectors_of(n_block) * (block_ / kernels_.vectors);
        const int64_t row_words = kTileStep * columns * block_;
        const int pixels = static_cast<int>(pixels_of(box.columns, args_.grid.w));
        MatrixTransform tile{words.products, kTileSide * product, product, nullptr, row_words, block_,
                             count};
        bool first = true;
        for (int64_t image = box.images.begin; image < box.images.end; ++image) {
            for (int64_t tile_row = box.rows.begin; tile_row < box.rows.end; ++tile_row) {
                for (int64_t column = 0; column < columns; ++column) {
                    tile.out = words.sums + kTileStep * column * block_;
                    kernels_.transform_output(tile);
                    tile.in += block_;
                }
                for (int64_t i = 0; i < kTileStep; ++i) {
                    const int64_t row = kTileStep * tile_row + i;
                    if (row >= args_.grid.h) break;
                    store({words.sums + i * row_words, block_, pixels}, n_block * block_,
                          out_pixel(image, row, kTileStep * box.columns.begin), about, about_stride, first);
                    first = false;
                }
            }
        }
    }

    const int64_t block_, channels_;
};

bool of_three(const TapAxis& axis) {
    return axis.step == 1 && axis.taps.size() == 3 && axis.consecutive();
}

}  // namespace

void use_winograd(WinogradUse where) {
    use.store(where, std::memory_order_relaxed);
}

bool winograd_pays(const ConvKernels& kernels, int64_t images, Axes out, int64_t in_channels,
                   int64_t out_channels, int64_t least_pixels) {
    const WinogradUse where = use.load(std::memory_order_relaxed);
    if (kernels.pack > 1 || where == WinogradUse::never) return false;
    if (where == WinogradUse::wherever_possible) return true;
    constexpr int64_t least_channels = 32;
    const int64_t pixels = images * out.h * out.w;
    const Axes tiles = tiles_of(out);
    return std::min(in_channels, out_channels) >= least_channels && pixels >= least_pixels &&
           images * tiles.h * tiles.w * kTileProducts * 5 <=
               pixels * 9 * 4;  // a fifth is for the transforms
}

bool winograd_pays(const Gather& args) {
    if (!(of_three(args.rows) && of_three(args.columns) && args.grid_step.h == 1 && args.grid_step.w == 1))
        return false;
    const ConvKernels& kernels = *convolution_kernels(args.dtype);
    if (args.one_order)
        return winograd_pays(kernels, 1, {kTileStep, kTileStep}, args.in_channels, args.out_channels, 1);
    // Of fewer the weights' transform takes too long, beside products that AVX-512 makes twice as many of.
    const int64_t least_pixels = lanes_of(kernels) > 8 ? 256 : 150;
    return winograd_pays(kernels, args.batch, args.grid, args.in_channels, args.out_channels, least_pixels);
}

std::unique_ptr<GatherLoop> winograd_loop(const Gather& args, const ThreadPool& pool) {
    return std::make_unique<WinogradLoop>(args, pool);
}

}  // namespace fastres::cpu
