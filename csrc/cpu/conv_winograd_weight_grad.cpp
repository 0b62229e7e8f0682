// The gradient of a 3x3 convolution's weights by Winograd's algorithm: that of conv_winograd.cpp, each step
// of it transposed.
#include "cpu/conv_weight_grad.h"

namespace fastres::cpu {
namespace {

constexpr int64_t kSide = 4, kProducts = kSide * kSide;  // of a tile that is multiplied
constexpr int64_t kOutSide = 2;                          // of the pixels whose gradients it takes

class WinogradLoop : WeightGradTasks {
  public:
    WinogradLoop(const ConvBackwardWeight& args, const ThreadPool& pool)
        : WeightGradTasks(args, args.shape, kProducts, pool), block_(kernels_.block) {}

    void run() const {
        const Axes tiles{ceil_div(shape_.out.h, kOutSide), ceil_div(shape_.out.w, kOutSide)};
        const Boxes boxes(shape_.batch, tiles, tiles_of_box());
        WeightGradTasks::run(
            boxes, words_of(boxes),
            [&](const Boxes& boxes, Range range, const Chunk& chunk, float* words, float* sums) {
                for (int64_t index = range.begin; index < range.end; ++index)
                    sum(boxes[index], chunk, words, sums, index > range.begin);
            },
            [&](const Chunk& chunk, const float* sums) { store_weights(chunk, sums); });
    }

  private:
    // The rounding errors of a box's sums grow with its pixels, and average out over many boxes.
    int64_t tiles_of_box() const {
        constexpr int64_t usual = 64, many = 8192, few = 2048;
        const int64_t pixels = shape_.batch * shape_.out.h * shape_.out.w;
        if (pixels >= many) return usual;
        return pixels >= few ? usual / 2 : usual / 4;
    }

    static Axes patch_of(const Box& box) {
        return {kOutSide * box.rows.size() + 2, kOutSide * box.columns.size() + 2};
    }
    static Axes pixels_of(const Box& box) {
        return {kOutSide * box.rows.size(), kOutSide * box.columns.size()};
    }

    int64_t words_of(const Boxes& boxes) const {
        if (boxes.count() == 0) return 0;
        const Box box = boxes[0];
        // Boxes differ by one row, column or image.
        const Box largest{
            {0, box.images.size() + 1}, {0, box.rows.size() + 1}, {0, box.columns.size() + 1}};
        const Axes patch = patch_of(largest);
        return kProducts * largest.pixels() * (in_chunk_ + out_chunk_) +
               largest.images.size() * patch.h * patch.w * std::max(in_chunk_, out_chunk_);
    }

    // sums[product][in channel][out channel] (+)= those of a box
    void sum(const Box& box, const Chunk& chunk, float* words, float* sums, bool add) const {
        float* input = words;                                        // [product][tile][channel]
        float* grad = input + kProducts * box.pixels() * in_chunk_;  // [block][product][tile][n]
        float* patch = grad + kProducts * box.pixels() * out_chunk_;
        load_input(box, chunk.in_channels, patch, input);
        load_grad(box, chunk.out_channels, patch, grad);
        const int64_t tiles = box.pixels(), in_channels = chunk.in_channels.size();
        const int64_t run = 0, lanes = block_ / kernels_.vectors;
        const int64_t groups = ceil_div(in_channels, kernels_.tile_rows);
        MultiplyTile tile{};
        tile.row_stride = 1;
        tile.step_stride = in_channels;
        tile.runs = &run;
        tile.run_count = 1;
        tile.steps = tiles;
        tile.sums_stride = out_chunk_;
        tile.add = add;
        for (int64_t product = 0; product < kProducts; ++product) {
            for (int64_t n = 0; n < chunk.out_channels.size(); n += block_) {
                tile.b = grad + (n / block_ * kProducts + product) * tiles * block_;
                tile.vectors =
                    static_cast<int>(ceil_div(std::min(block_, chunk.out_channels.size() - n), lanes));
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
        const Axes size = patch_of(box);
        PixelRow pixels{};
        pixels.column = kOutSide * box.columns.begin - shape_.padding.w;
        pixels.column_step = 1;
        pixels.columns = size.w;
        pixels.first_channel = channels.begin;
        pixels.channels = channels.size();
        load_rows(args_.input, shape_.in, shape_.in_channels,
                  {box.images, kOutSide * box.rows.begin - shape_.padding.h, 1, size.h}, pixels, patch);
        const int64_t product = box.pixels() * channels.size();
        transform_tiles(box, size, kernels_.transform_input,
                        {patch, size.w * channels.size(), channels.size(), words, kSide * product, product,
                         channels.size()},
                        channels.size());
    }

    void load_grad(const Box& box, Range channels, float* patch, float* words) const {
        const Axes size = pixels_of(box);
        PixelRow pixels{};
        pixels.column = kOutSide * box.columns.begin;
        pixels.column_step = 1;
        pixels.columns = size.w;
        const int64_t product = box.pixels() * block_;
        for (int64_t n = channels.begin; n < channels.end; n += block_) {
            pixels.first_channel = n;
            pixels.channels = std::min(block_, channels.end - n);
            load_rows(args_.grad, shape_.out, shape_.out_channels,
                      {box.images, kOutSide * box.rows.begin, 1, size.h}, pixels, patch);
            transform_tiles(box, size, kernels_.transform_output_grad,
                            {patch, size.w * pixels.channels, pixels.channels, words, kSide * product,
                             product, pixels.channels},
                            block_);
            words += kProducts * product;
        }
    }

    // patch[image][row][column][channel]
    void load_rows(const ConvOperand& operand, Axes size, int64_t channels, const ImageRows& rows,
                   const PixelRow& pixels, float* patch) const {
        visit_rows(operand, args_.dtype, size, channels, rows, pixels, [&](const PixelRow& row) {
            kernels_.load_channels(row, patch);
            patch += row.columns * row.channels;
        });
    }

    // `tile` is the first one's, `patch` the pixels of an image; the results are out_stride floats apart.
    static void transform_tiles(const Box& box, Axes patch, void (*transform)(const MatrixTransform&),
                                MatrixTransform tile, int64_t out_stride) {
        const float* pixels = tile.in;
        for (int64_t image = 0; image < box.images.size(); ++image) {
            for (int64_t row = 0; row < box.rows.size(); ++row) {
                for (int64_t column = 0; column < box.columns.size(); ++column) {
                    const int64_t pixel = (image * patch.h + kOutSide * row) * patch.w + kOutSide * column;
                    tile.in = pixels + pixel * tile.in_column;
                    transform(tile);
                    tile.out += out_stride;
                }
            }
        }
    }

    void store_weights(const Chunk& chunk, const float* sums) const {
        static thread_local Workspace workspace;
        const int64_t words = in_chunk_ * out_chunk_;
        float* taps = workspace.floats(taps_ * words);
        kernels_.transform_weight_grad({sums, kSide * words, words, taps, 3 * words, words, words});
        store(chunk, taps);
    }

    const int64_t block_;
};

}  // namespace

void weight_grad_by_winograd(const ConvBackwardWeight& args, const ThreadPool& pool) {
    WinogradLoop(args, pool).run();
}

}  // namespace fastres::cpu
