// The gradient of the weights that see images, whose few channels would leave most rows of a tile unused.
//
// What a row of the kernel sees of an image is one stretch of its row. Taken as the channels of a single
// pixel, these are many, and the kernel is left with one column: a 7x7 convolution of 3 channels is a 7x1
// of
// 21. Neighbouring pixels then overlap in memory, and nothing is copied but the image, with its padding.
#include <cstring>

#include "cpu/conv_weight_grad.h"

namespace fastres::cpu {
namespace {

// Each row with the padding beside it, and some zeros behind the last one.
const void* padded(const ConvBackwardWeight& args, int64_t columns, Workspace& workspace,
                   const ThreadPool& pool) {
    constexpr int64_t behind = 64;  // values that whole vectors may take of what follows the last pixel
    const Conv2d& shape = args.shape;
    const int64_t pixel = shape.in_channels * size_of(args.dtype), row = columns * pixel;
    const int64_t rows = shape.batch * shape.in.h;
    const int64_t bytes = rows * row + behind * size_of(args.dtype);
    char* out = reinterpret_cast<char*>(workspace.floats(ceil_div(bytes, sizeof(float))));
    const int64_t left = shape.padding.w * pixel, inside = shape.in.w * pixel;
    const int64_t tasks = tasks_for(rows * columns * shape.in_channels, rows, pool);
    pool.for_each(tasks, [&](int64_t task) {
        const Range mine = part(rows, tasks, task);
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            char* to = out + i * row;
            std::memset(to, 0, left);
            std::memcpy(to + left, static_cast<const char*>(args.input.data) + i * inside, inside);
            std::memset(to + left + inside, 0, row - left - inside);
        }
    });
    std::memset(out + rows * row, 0, behind * size_of(args.dtype));
    return out;
}

}  // namespace

bool is_of_images(const ConvBackwardWeight& args) {
    constexpr int64_t most_channels = 4;
    const Conv2d& shape = args.shape;
    return shape.in_channels <= most_channels && shape.kernel.w > 1 && shape.dilation.w == 1 &&
           args.input.prologue.kind == Prologue::none &&
           // The columns' weights follow each other as the channels' do.
           args.grad_weight.stride_w == shape.in_channels * args.grad_weight.stride_in;
}

void weight_grad_of_images(const ConvBackwardWeight& args, const ThreadPool& pool) {
    static thread_local Workspace workspace;
    ConvBackwardWeight by_rows = args;
    Conv2d& shape = by_rows.shape;
    shape.in.w += 2 * shape.padding.w;
    by_rows.input.data = padded(args, shape.in.w, workspace, pool);
    by_rows.input.pixel_stride = shape.in_channels;
    shape.in_channels *= shape.kernel.w;
    shape.kernel.w = 1;
    shape.padding.w = 0;
    weight_grad_directly(by_rows, pool);
}

}  // namespace fastres::cpu
