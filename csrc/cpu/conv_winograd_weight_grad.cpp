// The gradient of a 3x3 convolution's weights by Winograd's algorithm: that of conv_winograd.cpp, each step
// of it transposed.
#include "cpu/conv_tiles.h"
#include "cpu/conv_weight_grad.h"

namespace fastres::cpu {
namespace {

class WinogradLoop : WeightGradTasks {
  public:
    WinogradLoop(const ConvBackwardWeight& args, const ThreadPool& pool)
        : WeightGradTasks(args, args.shape, kTileProducts, pool), block_(kernels_.block) {}

    void run() const {
        constexpr int64_t usual = 64;
        const Boxes boxes(shape_.batch, tiles_of(shape_.out), size_of_box(usual));
        WeightGradTasks::run(
            boxes, words_of(boxes.largest()),
            [&](const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) {
                for (int64_t index = range.begin; index < range.end; ++index)
                    sum(boxes[index], chunk, words, sums, index > range.begin);
            },
            [&](const Chunk& chunk, const float* sums) { store_weights(chunk, sums); });
    }

  private:
    int64_t words_of(const Box& largest) const {
        const Axes patch = in_pixels_of(largest);
        return kTileProducts * largest.pixels() * (in_chunk_ + out_chunk_) +
               largest.images.size() * patch.h * patch.w * std::max(in_chunk_, out_chunk_);
    }

    // sums[product][in channel][out channel] (+)= those of a box
    void sum(const Box& box, const Chunk& chunk, float* words, float* sums, bool add) const {
        float* input = words;                                            // [product][tile][channel]
        float* grad = input + kTileProducts * box.pixels() * in_chunk_;  // [block][product][tile][n]
        float* patch = grad + kTileProducts * box.pixels() * out_chunk_;
        load_input(box, chunk.in_channels, patch, input);
        load_grad(box, chunk.out_channels, patch, grad);
        const int64_t tiles = box.pixels(), in_channels = chunk.in_channels.size();
        const int64_t run = 0, groups = ceil_div(in_channels, kernels_.tile_rows);
        MultiplyTile tile{};
        tile.row_stride = 1;
        tile.step_stride = in_channels;
        tile.runs = &run;
        tile.run_count = 1;
        tile.steps = tiles;
        tile.sums_stride = out_chunk_;
        tile.add = add;
        for (int64_t product = 0; product < kTileProducts; ++product) {
            for (int64_t n = 0; n < chunk.out_channels.size(); n += block_) {
                tile.b = grad + (n / block_ * kTileProducts + product) * tiles * block_;
                tile.vectors = cpu::vectors_of(kernels_, chunk.out_channels.size() - n);
                for (int64_t group = 0; group < groups; ++group) {
                    const Range channels = part(in_channels, groups, group);
                    tile.a = input + product * tiles * in_channels + channels.begin;
                    tile.sums = sums + (product * in_chunk_ + channels.begin) * out_chunk_ + n;
                    tile.rows = static_cast<int>(channels.size());
                    kernels_.multiply(tile);
                }
            }
        }
    }

    void load_input(const Box& box, Range channels, float* patch, float* words) const {
        const Axes size = in_pixels_of(box);
        PixelRow pixels{};
        pixels.column = kTileStep * box.columns.begin - shape_.padding.w;
        pixels.column_step = 1;
        pixels.columns = size.w;
        pixels.first_channel = channels.begin;
        pixels.channels = channels.size();
        load_rows(kernels_, args_.input, args_.dtype, shape_.in, shape_.in_channels,
                  {box.images, kTileStep * box.rows.begin - shape_.padding.h, {size.h}}, pixels, patch);
        const int64_t product = box.pixels() * channels.size();
        transform_tiles(box, size, kernels_.transform_input,
                        {patch, size.w * channels.size(), channels.size(), words, kTileSide * product,
                         product, channels.size()},
                        channels.size());
    }

    void load_grad(const Box& box, Range channels, float* patch, float* words) const {
        const Axes size = out_pixels_of(box);
        PixelRow pixels{};
        pixels.column = kTileStep * box.columns.begin;
        pixels.column_step = 1;
        pixels.columns = size.w;
        const int64_t product = box.pixels() * block_;
        for (int64_t n = channels.begin; n < channels.end; n += block_) {
            pixels.first_channel = n;
            pixels.channels = std::min(block_, channels.end - n);
            load_rows(kernels_, args_.grad, args_.dtype, shape_.out, shape_.out_channels,
                      {box.images, kTileStep * box.rows.begin, {size.h}}, pixels, patch);
            transform_tiles(box, size, kernels_.transform_output_grad,
                            {patch, size.w * pixels.channels, pixels.channels, words, kTileSide * product,
                             product, pixels.channels},
                            block_);
            words += kTileProducts * product;
        }
    }

    void store_weights(const Chunk& chunk, const float* sums) const {
        static thread_local Workspace workspace;
        const int64_t words = in_chunk_ * out_chunk_;
        float* taps = workspace.floats(taps_ * words);
        kernels_.transform_weight_grad({sums, kTileSide * words, words, taps, 3 * words, words, words});
        store(chunk, taps, RowsOf::in_channels);
    }

    const int64_t block_;
};

}  // namespace

void weight_grad_by_winograd(const ConvBackwardWeight& args, const ThreadPool& pool) {
    WinogradLoop(args, pool).run();
}

}  // namespace fastres::cpu
