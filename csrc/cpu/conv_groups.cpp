// The output of a grouped convolution and the gradient of its input: blocks of channels, each of which sees
// only itself.
#include "cpu/conv_groups.h"

#include "cpu/conv_gather.h"
#include "cpu/prefetch.h"

namespace fastres::cpu {
namespace {

class GroupLoop final : public GatherLoop {
  public:
    GroupLoop(const Gather& args, const ThreadPool& pool)
        : GatherLoop(args, pool),
          channels_(args.in_channels / args.groups),
          words_(channels_ / kernels_.pack),
          lanes_(lanes_of(kernels_)),
          table_(group_words(kernels_, channels_, words_)),
          three_taps_(args.columns.taps.size() == 3 && args.columns.consecutive() &&
                      args.columns.step <= kMostPixelStep) {}

    int64_t packed_floats() const override { return n_blocks_ * taps_ * words_ * kernels_.block; }

    void pack(float* packed) const override {
        pool_.for_each(n_blocks_, [&](int64_t n_block) { pack(n_block, packed); });
    }

    void run() override {
        const float* weight = packed_weight();
        constexpr int64_t pixels = 448;
        const Boxes boxes(args_.batch, args_.grid, pixels);
        for_each_box(boxes, [&](int64_t index, Range n_blocks, Moments* moments) {
            static thread_local Workspace workspace;
            for (int64_t n = n_blocks.begin; n < n_blocks.end; ++n) {
                Prefetch prefetch;
                if (n + 1 < n_blocks_)
                    fetch(boxes[index], n + 1, prefetch);
                else if (index + 1 < boxes.count())
                    fetch(boxes[index + 1], 0, prefetch);
                gather(boxes[index], n, weight, workspace, moments, prefetch);
            }
        });
    }

  private:
    // [n block][tap][word][n]
    void pack(int64_t n_block, float* packed) const {
        const int64_t block = kernels_.block;
        AlignedVector<float> group(words_ * block);
        float* words = packed + n_block * taps_ * words_ * block;
        const int64_t first = n_block * block, end = std::min(first + block, args_.out_channels);
        std::fill_n(words, taps_ * words_ * block, 0.0f);
        for (const Tap& row : args_.rows.taps) {
            for (const Tap& column : args_.columns.taps) {
                for (int64_t channel = first; channel < end; channel += channels_) {
                    pack_group(row, column, channel, group.data());
                    for (int64_t word = 0; word < words_; ++word)
                        std::copy_n(group.data() + word * block, channels_,
                                    words + word * block + channel - first);
                }
                words += words_ * block;
            }
        }
    }

    // The weights of one tap: words[k][block], of the group that begins with a channel.
    void pack_group(const Tap& row, const Tap& column, int64_t channel, float* words) const {
        const int64_t element = channel * args_.weight.stride_out + row.kernel * args_.weight.stride_h +
                                column.kernel * args_.weight.stride_w;
        kernels_.pack_weight({static_cast<char*>(args_.weight.data) + element * size_of(args_.weight.dtype),
                              args_.weight.dtype, channels_, channels_, args_.k_stride, args_.n_stride},
                             words);
    }

    // The input's channels of a box: a piece of each pixel.
    void fetch(const Box& box, int64_t n_block, Prefetch& prefetch) const {
        if (taps_ == 0) return;
        const int64_t first = n_block * kernels_.block;
        const int64_t channels = std::min<int64_t>(kernels_.block, args_.out_channels - first);
        const Range pixels = seen_pixels(box);
        const int64_t value = size_of(args_.dtype);
        for (const void* operand : {args_.input.data, args_.input.bn_input})
            prefetch.add(at(operand, pixels.begin * args_.in_channels + first, args_.dtype), pixels.size(),
                         channels * value, args_.in_channels * value);
    }

    // All that a box's pixels gather, for one block of channels.
    void gather(const Box& box, int64_t n_block, const float* weight, Workspace& workspace,
                Moments* moments, Prefetch& prefetch) const {
        const int64_t block = kernels_.block, first = n_block * block;
        const int64_t channels = std::min(block, args_.out_channels - first);
        const Axes patch = patch_of(box);
        const int64_t pixel_words = ceil_div(channels, kernels_.pack);
        const int64_t sums_words = kernels_.group_rows * block;
        const int64_t patch_words = box.images.size() * patch.h * patch.w * pixel_words;
        // A vector is loaded from where its first word lies.
        float* sums = workspace.floats(sums_words + 3 * block + patch_words + lanes_);
        float* about = sums + sums_words;
        float* words = about + 3 * block;
        if (moments) std::fill_n(about, 3 * block, 0.0f);
        if (taps_ > 0) load_patch(box, first, pixel_words, words);

        const std::vector<int64_t> runs = runs_of(box, pixel_words, three_taps_);
        MultiplyGroups tile{};
        tile.taps = three_taps_ ? 3 : 1;
        tile.pixel_step = static_cast<int>(three_taps_ ? args_.columns.step : 1);
        tile.pixel_stride = (three_taps_ ? 1 : args_.columns.patch_step()) * pixel_words;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = words_;
        tile.words = table_.data();
        tile.sums_stride = block;
        const int64_t width = box.columns.size(), parts = ceil_div(width, kernels_.group_rows);
        prefetch.spread(box.images.size() * box.rows.size() * parts);
        for (int64_t image = 0; image < box.images.size(); ++image) {
            for (int64_t row = 0; row < box.rows.size(); ++row) {
                for (int64_t index = 0; index < parts; ++index) {
                    const Range span = part(width, parts, index);
                    const int64_t pixel =
                        (image * patch.h + row) * patch.w + span.begin * args_.columns.patch_step();
                    tile.rows = static_cast<int>(span.size());
                    prefetch.step();
                    for (int64_t c = 0; c < channels; c += lanes_) {
                        tile.a = words + pixel * pixel_words + first_of_group(c, channels_) / kernels_.pack;
                        tile.b = weight + n_block * taps_ * words_ * block + c;
                        tile.sums = sums + c;
                        kernels_.multiply_groups(tile);
                    }
                    store({sums, block, tile.rows}, first,
                          out_pixel(box.images.begin + image, box.rows.begin + row,
                                    box.columns.begin + span.begin),
                          moments ? about : nullptr, block, image + row + index == 0);
                }
            }
        }
        if (moments) set_moments({n_block, n_block + 1}, box.pixels(), about, block, moments);
    }

    const int64_t channels_, words_;  // of a group
    const int64_t lanes_;
    const std::vector<int32_t> table_;
    const bool three_taps_;  // neighbours in a row are one run
};

}  // namespace

std::unique_ptr<GatherLoop> group_loop(const Gather& args, const ThreadPool& pool) {
    return std::make_unique<GroupLoop>(args, pool);
}

}  // namespace fastres::cpu
