// The output of a convolution and the gradient of its input, pixel by pixel.
#include "cpu/conv_gather.h"

#include "cpu/huge_pages.h"
#include "cpu/prefetch.h"

namespace fastres::cpu {
namespace {

bool is_pointwise(const TapAxis& axis) {
    return axis.taps.size() == 1 && axis.first() == 0 && axis.step == 1;
}

// Whether a pixel of the output sees the same one of the input. Not so where the output's pixels are apart,
// if there is but one: other taps of the kernel see what is beside it.
bool is_pointwise(const Gather& args) {
    return is_pointwise(args.rows) && is_pointwise(args.columns) && args.grid_step.h == 1 &&
           args.grid_step.w == 1;
}

// Whether it does, and all are one row.
bool is_one_row(const Gather& args) {
    return is_pointwise(args) && args.batch == 1 && args.in.h == 1 && args.grid.h == 1 &&
           args.in.w == args.grid.w;
}

class DirectLoop final : public GatherLoop {
  public:
    DirectLoop(const Gather& args, const ThreadPool& pool)
        : GatherLoop(args, pool),
          k_block_(block_of_k()),
          in_place_(is_one_row(args) && words_are_values() && args.input.prologue.kind == Prologue::none) {}

    int64_t packed_floats() const override { return n_blocks_ * taps_ * k_words_ * kernels_.block; }

    void pack(float* packed) const override {
        pool_.for_each(n_blocks_, [&](int64_t n_block) { pack(n_block, packed); });
    }

    void run() override {
        const float* weight = packed_weight();
        const Boxes boxes(args_.batch, args_.grid, pixels_of_box());
        for_each_box(boxes, [&](int64_t index, Range n_blocks, Moments* moments) {
            static thread_local Workspace workspace;
            Prefetch prefetch;
            if (n_blocks.end == n_blocks_ && index + 1 < boxes.count()) fetch(boxes[index + 1], prefetch);
            gather(boxes[index], n_blocks, weight, workspace, moments, prefetch);
        });
    }

    // A box by itself, by the calling thread. Returns the words of its input, [pixel][word of channels],
    // which stay in the workspace.
    const float* gather_alone(const Box& box, const float* weight, Workspace& workspace) const {
        Prefetch nothing;
        return gather(box, {0, n_blocks_}, weight, workspace, nullptr, nothing);
    }

    // Whether these are all of its values, as the prologue makes them, in the order of its own memory.
    bool keeps_values() const { return k_block_ >= k_words_ && !in_place_ && words_are_values(); }

    using GatherLoop::packed_weight;

  private:
    // Whether a pixel's words are its channels as a tensor holds them.
    bool words_are_values() const {
        return kernels_.pack * size_of(args_.dtype) == sizeof(float) &&
               args_.in_channels % kernels_.pack == 0;
    }

    // Smaller boxes only where there would be too little for each thread, however the channels are cut.
    int64_t pixels_of_box() const {
        constexpr int64_t least = 28;
        const int64_t usual = usual_pixels();
        const int64_t boxes_wanted = ceil_div(pool_.threads(), n_blocks_);
        return std::clamp(pixels() / boxes_wanted, least, usual);
    }

    // Whether products are added up in tiles of many rows, as by AMX.
    bool by_tiles() const { return kernels_.row_grain > 1; }

    int64_t usual_pixels() const {
        if (!by_tiles()) return 200;
        // The weights of many taps are read from the outer caches, once for each box.
        constexpr int64_t words_in_cache = 256 * 1024;
        const int64_t rows = kernels_.tile_rows, least = 7 * rows, most = 25 * rows;
        const int64_t words = k_words_ * args_.rows.patch_step() * args_.columns.patch_step();
        return taps_ == 1 ? least : std::clamp(words_in_cache / words / rows * rows, least, most);
    }

    int64_t block_of_k() const {
        // Tiles add up to what is there by way of memory.
        if (by_tiles()) return k_words_;
        // PyTorch's sums are the more exact ones of few pixels, where also the batch norm's errors hide
        // less, and of many taps. Only of one tap the order of a packed weight does not depend on this.
        constexpr int64_t few_pixels = 512, most_words = 256;
        const bool few =
            args_.dtype != Dtype::bf16 && pixels() < few_pixels && (taps_ == 1 || !args_.one_order);
        const bool exact = few || (args_.dtype != Dtype::bf16 && taps_ > 1);
        const int64_t least_words = few ? 8 : exact ? 16 : 32, most_steps = few ? 64 : exact ? 160 : 640;
        const int64_t most =
            std::max(least_words, std::min(most_words, most_steps / std::max<int64_t>(1, taps_)));
        return ceil_div(k_words_, ceil_div(k_words_, most));
    }

    // [n block][k block][tap][k word][n]. Read tap by tap: channels lie beside each other.
    void pack(int64_t n_block, float* packed) const {
        float* words = packed + n_block * taps_ * k_words_ * kernels_.block;
        int64_t tap = 0;
        for (const Tap& row : args_.rows.taps) {
            for (const Tap& column : args_.columns.taps) {
                for (int64_t k = 0; k < k_words_; k += k_block_) {
                    const int64_t k_words = std::min(k_block_, k_words_ - k), first = k * kernels_.pack;
                    const int64_t channels = std::min(k_words * kernels_.pack, args_.in_channels - first);
                    pack_tap(row, column, first, channels, n_block,
                             words + (taps_ * k + tap * k_words) * kernels_.block);
                }
                ++tap;
            }
        }
    }

    // All that a box's pixels gather, for some blocks of output channels. Returns the words of the input
    // that were loaded last.
    const float* gather(const Box& box, Range n_blocks, const float* weight, Workspace& workspace,
                        Moments* moments, Prefetch& prefetch) const {
        const int64_t channels = n_blocks.size() * kernels_.block;
        const Axes patch = patch_of(box);
        const Stretch stretch = stretch_of(box, patch);
        // Sums of all input channels are stored at once, and their memory, which is in the innermost cache,
        // is used again.
        const bool of_tile = taps_ > 0 && k_block_ >= k_words_;
        const int64_t sums_stride = of_tile ? kernels_.block : channels;
        const int64_t sums_rows =
            of_tile ? kernels_.tile_rows : box.images.size() * box.rows.size() * stretch.pitch;
        const int64_t sums_words = sums_rows * sums_stride;
        const int64_t patch_words = in_place_ ? 0 : box.images.size() * patch.h * patch.w * k_block_;
        float* sums = workspace.floats(sums_words + patch_words + 3 * channels);
        float* words = sums + sums_words;
        float* about = words + patch_words;
        // Moments are taken about the first pixel: a mean far from zero costs no digits.
        if (moments) std::fill_n(about, 3 * channels, 0.0f);
        const Sums of_box{sums, sums_stride, of_tile, moments ? about : nullptr, channels, stretch};
        if (taps_ == 0) std::fill_n(sums, sums_words, 0.0f);
        prefetch.spread(n_blocks.size() * box.images.size() * box.rows.size() / stretch.rows *
                        groups_of(stretch) * ceil_div(k_words_, k_block_));
        int64_t k = 0;
        do {
            const int64_t k_words = std::min(k_block_, k_words_ - k);
            if (in_place_) {
                const float* input = static_cast<const float*>(args_.input.data);
                multiply(box, patch, n_blocks, k, k_words, weight,
                         {input + box.columns.begin * k_words_ + k, k_words_}, of_box, prefetch);
            } else {
                if (taps_ > 0) load_patch(box, k * kernels_.pack, k_words, words);
                multiply(box, patch, n_blocks, k, k_words, weight, {words, k_words}, of_box, prefetch);
            }
            k += k_words;
        } while (k < k_words_);
        if (moments) set_moments(n_blocks, box.pixels(), about, channels, moments);
        return words;
    }

    // What a box reads of the input and the residual: stretches of memory but where rows are cut. Where a
    // stride skips pixels, most of that would be fetched in vain.
    void fetch(const Box& box, Prefetch& prefetch) const {
        if (taps_ == 0 || args_.rows.load_step() > 1 || args_.columns.load_step() > 1) return;
        const auto add = [&](const void* data, Range pixels, int64_t channels) {
            const int64_t bytes = pixels.size() * channels * size_of(args_.dtype);
            prefetch.add(at(data, pixels.begin * channels, args_.dtype), 1, bytes, bytes);
        };
        add(args_.input.data, seen_pixels(box), args_.in_channels);
        add(args_.input.bn_input, seen_pixels(box), args_.in_channels);
        if (args_.grid_step.h == 1 && args_.grid_step.w == 1)
            add(args_.residual, made_pixels(box), args_.out_channels);
    }

    // Rows of a box that are cut into tiles as one.
    struct Stretch {
        int64_t rows;
        int64_t pitch;   // sums from one row to the next
        int64_t pixels;  // and what lies between the rows
    };

    // A row; or all rows of an image, where that takes no more tiles: their pixels follow each other in the
    // patch, and what the kernel sees beside a row, between them, is multiplied in vain.
    Stretch stretch_of(const Box& box, Axes patch) const {
        const int64_t width = box.columns.size(), rows = box.rows.size(), grain = kernels_.row_grain;
        const Stretch row{1, width, width};
        if (!by_tiles() || taps_ == 0) return row;
        const int64_t pitch = patch.w / args_.columns.patch_step();
        const Stretch image{rows, pitch, (rows - 1) * pitch + width};
        return ceil_div(image.pixels, grain) <= rows * ceil_div(width, grain) ? image : row;
    }

    // Tiles that it is cut into.
    int64_t groups_of(const Stretch& stretch) const { return ceil_div(stretch.pixels, kernels_.tile_rows); }

    // What a box's products are added up in.
    struct Sums {
        float* data;  // [image][row][pitch of the stretch][stride]; or those of one tile, [row][stride]
        int64_t stride;
        bool of_tile;
        float* moments;  // shift, sum, sum of squares: [channels] each; or null
        int64_t channels;
        Stretch stretch;
    };

    // Pixels of a group that are neighbours in a row of the output.
    struct Strip {
        int64_t first;  // of the group's
        int pixels;
        int64_t output;  // the first one's place there
    };

    // What the grid's first pixel and those behind it see.
    struct Pixels {
        const float* words;
        int64_t stride;  // from one to the next
    };

    // Adds the products of some input channels; stores the sums after the last ones.
    void multiply(const Box& box, Axes patch, Range n_blocks, int64_t k, int64_t k_words,
                  const float* weight, const Pixels& pixels, const Sums& sums, Prefetch& prefetch) const {
        // Taps that are neighbours in the patch are one run.
        const bool merged = taps_ > 0 && args_.columns.consecutive();
        const std::vector<int64_t> runs = runs_of(box, pixels.stride, merged);
        MultiplyTile tile{};
        tile.row_stride = args_.columns.patch_step() * pixels.stride;
        tile.step_stride = 1;
        tile.runs = runs.data();
        tile.run_count = static_cast<int64_t>(runs.size());
        tile.steps = merged ? k_words * static_cast<int64_t>(args_.columns.taps.size()) : k_words;
        tile.sums_stride = sums.stride;
        tile.add = k > 0;
        tile.prefetch = &prefetch;
        const bool last = k + k_words == k_words_;
        const int64_t block = kernels_.block, width = box.columns.size();
        const Stretch& stretch = sums.stretch;
        const int64_t groups = groups_of(stretch);
        int64_t first = 0;  // of the group's sums
        std::vector<Strip> strips;
        const auto begin_group = [&](int64_t image, int64_t row, int64_t group) {
            const Range span = part(stretch.pixels, groups, group, kernels_.row_grain);
            const int64_t patch_row = image * patch.h + row;
            const int64_t stretch_begin = (image * box.rows.size() + row) * stretch.pitch;
            first = stretch_begin + span.begin;
            tile.a = pixels.words +
                     (patch_row * patch.w + span.begin * args_.columns.patch_step()) * pixels.stride;
            tile.rows = static_cast<int>(span.size());
            strips.clear();
            if (!last) return;
            // Row by row, and nothing of what lies between.
            for (int64_t r = span.begin / stretch.pitch; r * stretch.pitch < span.end; ++r) {
                const int64_t row_begin = r * stretch.pitch;
                const int64_t begin = std::max(span.begin, row_begin);
                const int64_t end = std::min(span.end, row_begin + width);
                if (begin < end)
                    strips.push_back({begin - span.begin, static_cast<int>(end - begin),
                                      out_pixel(box.images.begin + image, box.rows.begin + row + r,
                                                box.columns.begin + begin - row_begin)});
            }
        };
        const auto multiply_group = [&](int64_t n) {
            const int64_t channel = (n - n_blocks.begin) * block;
            tile.b = weight + (n * k_words_ + k) * taps_ * block;
            tile.sums = sums.data + (sums.of_tile ? 0 : first * sums.stride + channel);
            tile.vectors = cpu::vectors_of(kernels_, args_.out_channels - n * block);
            if (taps_ > 0) kernels_.multiply(tile);
            for (const Strip& strip : strips)
                store({tile.sums + strip.first * sums.stride, sums.stride, strip.pixels}, n * block,
                      strip.output, sums.moments ? sums.moments + channel : nullptr, sums.channels,
                      first + strip.first == 0);
        };
        // The weights of all blocks stay in the cache if they fit in; else one block's do.
        const int64_t cached_words = (kernels_.pack > 1 ? 96 : 64) * 1024;
        const bool blocks_inside = n_blocks.size() * taps_ * k_words * block <= cached_words;
        const Range all = n_blocks;
        for (int64_t outer = all.begin; outer < (blocks_inside ? all.begin + 1 : all.end); ++outer)
            for (int64_t image = 0; image < box.images.size(); ++image)
                for (int64_t row = 0; row < box.rows.size(); row += stretch.rows)
                    for (int64_t group = 0; group < groups; ++group) {
                        begin_group(image, row, group);
                        for (int64_t n = outer; n < (blocks_inside ? all.end : outer + 1); ++n)
                            multiply_group(n);
                    }
    }

    const int64_t k_block_;  // words that are multiplied at a time
    const bool in_place_;    // the input's memory is what is multiplied
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
    const bool whole = args.grid.h == args.out.h && args.grid.w == args.out.w && args.in.h == args.out.h &&
                       args.in.w == args.out.w;
    if (!is_pointwise(args) || !whole) return;
    args.in = args.out = args.grid = {1, args.batch * args.in.h * args.in.w};
    args.batch = 1;
}

std::unique_ptr<GatherLoop> loop(const Gather& args, const ThreadPool& pool) {
    if (args.groups > 1) return group_loop(args, pool);
    if (winograd_pays(args)) return winograd_loop(args, pool);
    return std::make_unique<DirectLoop>(args, pool);
}

void run(const Gather& args, const ThreadPool& pool) {
    if (args.batch * args.grid.h * args.grid.w > 0) loop(args, pool)->run();
}

Gather forward_gather(const ConvForward& args) {
    const Conv2d& shape = args.shape;
    Gather gather{};
    gather.batch = shape.batch;
    gather.dtype = args.dtype;
    gather.input = args.input;
    gather.in_channels = shape.in_channels;
    gather.groups = shape.groups;
    gather.in = shape.in;
    gather.output = args.output;
    gather.out_channels = shape.out_channels;
    gather.out = gather.grid = shape.out;
    gather.grid_step = {1, 1};
    gather.scale = args.scale;
    gather.shift = args.shift;
    gather.residual = args.residual;
    gather.relu = args.relu;
    gather.moments = args.moments;
    gather.rows = forward_taps(shape.kernel.h, shape.stride.h, shape.padding.h, shape.dilation.h);
    gather.columns = forward_taps(shape.kernel.w, shape.stride.w, shape.padding.w, shape.dilation.w);
    gather.weight = args.weight;
    gather.k_stride = args.weight.stride_in;
    gather.n_stride = args.weight.stride_out;
    gather.packed = args.packed;
    gather.one_order = args.packed != nullptr;
    return gather;
}

// What the input's pixels get that lie at `phase` from the first, `stride` apart: a stride spreads the
// output's pixels over the input, and the pixels between them see other taps.
Gather backward_gather(const ConvBackwardInput& args, Axes phase) {
    const Conv2d& shape = args.shape;
    Gather gather{};
    gather.batch = shape.batch;
    gather.dtype = args.dtype;
    gather.input = args.grad;
    gather.in_channels = shape.out_channels;
    gather.groups = shape.groups;
    gather.in = shape.out;
    gather.output = args.grad_input;
    gather.residual = args.add ? args.grad_input : nullptr;
    gather.out_channels = shape.in_channels;
    gather.out = shape.in;
    gather.grid = {ceil_div(shape.in.h - phase.h, shape.stride.h),
                   ceil_div(shape.in.w - phase.w, shape.stride.w)};
    gather.grid_first = phase;
    gather.grid_step = shape.stride;
    gather.rows = backward_taps(shape.kernel.h, shape.stride.h, shape.padding.h, shape.dilation.h, phase.h);
    gather.columns =
        backward_taps(shape.kernel.w, shape.stride.w, shape.padding.w, shape.dilation.w, phase.w);
    gather.weight = args.weight;
    gather.k_stride = args.weight.stride_out;
    gather.n_stride = args.weight.stride_in;
    flatten(gather);
    return gather;
}

void advise_grad_input(const ConvBackwardInput& args) {
    const Conv2d& shape = args.shape;
    advise_huge_pages(args.grad_input,
                      shape.batch * shape.in.h * shape.in.w * shape.in_channels * size_of(args.dtype));
}

Gather packing_gather(const ConvForward& args) {
    Gather gather = forward_gather(args);
    gather.one_order = true;
    return gather;
}

}  // namespace

void conv_forward(const ConvForward& args, const ThreadPool& pool) {
    const Conv2d& shape = args.shape;
    advise_huge_pages(args.output,
                      shape.batch * shape.out.h * shape.out.w * shape.out_channels * size_of(args.dtype));
    Gather gather = forward_gather(args);
    flatten(gather);
    run(gather, pool);
}

void conv_forward_rows(const ConvForward& args, int64_t image, Range rows, void* output) {
    const Conv2d& shape = args.shape;
    Gather gather = forward_gather(args);
    gather.batch = 1;
    gather.input.data =
        at(args.input.data, image * shape.in.h * shape.in.w * shape.in_channels, args.dtype);
    gather.output = output;
    gather.out.h = gather.grid.h = rows.size();
    for (Tap& tap : gather.rows.taps) tap.offset += rows.begin * shape.stride.h;
    run(gather, serial_pool());
}

int64_t packed_floats(const ConvForward& args, const ThreadPool& pool) {
    const Gather gather = packing_gather(args);
    return loop(gather, pool)->packed_floats();
}

void pack_weight(const ConvForward& args, float* packed, const ThreadPool& pool) {
    const Gather gather = packing_gather(args);
    loop(gather, pool)->pack(packed);
}

void conv_backward_input(const ConvBackwardInput& args, const ThreadPool& pool) {
    const Conv2d& shape = args.shape;
    advise_grad_input(args);
    for (int64_t h = 0; h < std::min(shape.stride.h, shape.in.h); ++h) {
        for (int64_t w = 0; w < std::min(shape.stride.w, shape.in.w); ++w) {
            const Gather gather = backward_gather(args, {h, w});
            const bool unseen = gather.rows.taps.empty() || gather.columns.taps.empty();
            if (!(args.add && unseen)) run(gather, pool);
        }
    }
}

struct InputGradByBox::Loop {
    Loop(const ConvBackwardInput& args, const ThreadPool& pool)
        : gather(backward_gather(args, {0, 0})), direct(gather, pool) {}

    const Gather gather;
    const DirectLoop direct;
};

InputGradByBox::InputGradByBox(const ConvBackwardInput& args, const ThreadPool& pool)
    : args_(args), loop_(std::make_unique<Loop>(args, pool)) {}

InputGradByBox::~InputGradByBox() = default;

bool InputGradByBox::keeps_values() const {
    return is_one_row(loop_->gather) && loop_->direct.keeps_values();
}

void InputGradByBox::begin() {
    advise_grad_input(args_);
    weight_ = loop_->direct.packed_weight();
}

const float* InputGradByBox::operator()(Range pixels) const {
    static thread_local Workspace workspace;
    return loop_->direct.gather_alone({{0, 1}, {0, 1}, pixels}, weight_, workspace);
}

}  // namespace fastres::cpu
