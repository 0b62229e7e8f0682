#include "cpu/conv_max_pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cut.h"
#include "cpu/max_pool_windows.h"
#include "cpu/pointer.h"
#include "cpu/workspace.h"

namespace fastres::cpu {
namespace {

// Rows of an image that the convolution has made and that windows still see.
class ConvRows {
  public:
    ConvRows(const ConvForward& conv, int64_t image, int64_t most, Workspace& workspace)
        : conv_(conv),
          image_(image),
          row_bytes_(row_bytes(conv)),
          data_(reinterpret_cast<char*>(
              workspace.floats(ceil_div(most * row_bytes_, int64_t{sizeof(float)})))) {}

    static int64_t row_bytes(const ConvForward& conv) {
        return conv.shape.out.w * conv.shape.out_channels * size_of(conv.dtype);
    }

    // Has these rows, which begin and end no earlier than those before, and forgets the others.
    void move_to(Range rows) {
        const int64_t kept_from = std::min(std::max(rows.begin, held_.begin), held_.end);
        const Range kept{kept_from, held_.end};
        std::memmove(data_, data_ + (kept.begin - held_.begin) * row_bytes_, kept.size() * row_bytes_);
        const Range made{kept.size() > 0 ? kept.end : rows.begin, rows.end};
        held_ = rows;
        conv_forward_rows(conv_, image_, made, data_ + (made.begin - rows.begin) * row_bytes_);
    }

    const void* operator[](int64_t row) const { return data_ + (row - held_.begin) * row_bytes_; }

  private:
    const ConvForward& conv_;
    const int64_t image_, row_bytes_;
    char* const data_;
    Range held_{0, 0};
};

// Rows of the convolution's output that a run of windows sees.
Range seen_rows(const MaxPool2d& pool, Range windows) {
    return {std::max<int64_t>(0, windows.begin * pool.stride.h - pool.padding.h),
            std::min(pool.in.h, (windows.end - 1) * pool.stride.h - pool.padding.h + pool.kernel.h)};
}

// No more than that, of so many rows of windows.
int64_t most_seen_rows(const MaxPool2d& pool, int64_t windows) {
    return (windows - 1) * pool.stride.h + pool.kernel.h;
}

// Rows of windows at a time: what they see takes half of a usual core's own cache.
int64_t windows_at_a_time(const ConvMaxPool& args) {
    constexpr int64_t cached_bytes = int64_t{256} << 10;
    const int64_t rows = cached_bytes / ConvRows::row_bytes(args.conv);
    return std::max<int64_t>(1, (rows - args.pool.kernel.h) / args.pool.stride.h + 1);
}

// Parts of an image, each of which makes some rows again that the one before has made: no more of them than
// keep the threads busy.
int64_t parts_of_image(const MaxPool2d& pool, int64_t windows, const ThreadPool& threads) {
    constexpr int64_t tasks_a_thread = 4;
    const int64_t wanted = ceil_div(threads.threads() * tasks_a_thread, pool.batch);
    return std::min(wanted, ceil_div(pool.out.h, windows));
}

}  // namespace

void conv_max_pool(const ConvMaxPool& args, const ThreadPool& threads) {
    const MaxPool2d& pool = args.pool;
    ConvForward conv = args.conv;
    static thread_local Workspace packed;
    if (!conv.packed) {
        float* words = packed.floats(packed_floats(conv, threads));
        pack_weight(conv, words, threads);
        conv.packed = words;
    }
    const int64_t channels = conv.shape.out_channels, at_a_time = windows_at_a_time(args);
    const int64_t parts = parts_of_image(pool, at_a_time, threads);
    threads.for_each(pool.batch * parts, [&](int64_t task) {
        static thread_local Workspace rows_memory;
        const int64_t image = task / parts;
        ConvRows rows(conv, image, most_seen_rows(pool, at_a_time), rows_memory);
        WindowRows windows(pool, channels, conv.dtype);
        std::vector<uint8_t> index(pool.out.w * channels);  // nobody's, where there is no backward
        const auto pixels_of = [&](int64_t row) { return rows[row]; };
        const Range of_task = part(pool.out.h, parts, task % parts);
        for (int64_t row = of_task.begin; row < of_task.end; ++row) {
            if ((row - of_task.begin) % at_a_time == 0)
                rows.move_to(seen_rows(pool, {row, std::min(row + at_a_time, of_task.end)}));
            const int64_t element = (image * pool.out.h + row) * pool.out.w * channels;
            windows.maximum(row, pixels_of, at(args.output, element, conv.dtype), index.data());
        }
    });
}

}  // namespace fastres::cpu
