// Rows of windows over rows of channels-last pixels, wherever these are.
#pragma once

#include <vector>

#include "core/max_pool.h"
#include "cpu/kernels.h"

namespace fastres::cpu {

class WindowRows {
  public:
    WindowRows(const MaxPool2d& pool, int64_t channels, Dtype dtype)
        : pool_(pool), window_(pool.kernel.h), loop_(kernels().loops[dtype]->max_pool.forward) {
        row_.rows = window_.data();
        row_.kernel_h = pool.kernel.h;
        row_.kernel_w = pool.kernel.w;
        row_.stride = pool.stride.w;
        row_.padding = pool.padding.w;
        row_.width = pool.in.w;
        row_.out_width = pool.out.w;
        row_.channels = channels;
    }

    // The largest pixels of an image's `row`-th row of windows, and which they are; pixels_of(row of the
    // image) is asked for each that they see, from above.
    template <class PixelsOf>
    void maximum(int64_t row, const PixelsOf& pixels_of, void* output, uint8_t* index) {
        const int64_t first = row * pool_.stride.h - pool_.padding.h;
        for (int64_t i = 0; i < pool_.kernel.h; ++i)
            window_[i] = first + i >= 0 && first + i < pool_.in.h ? pixels_of(first + i) : nullptr;
        row_.output = output;
        row_.index = index;
        loop_(row_);
    }

  private:
    const MaxPool2d& pool_;
    std::vector<const void*> window_;
    void (*const loop_)(const MaxPoolRow&);
    MaxPoolRow row_{};
};

}  // namespace fastres::cpu
