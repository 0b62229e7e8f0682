// How the pixels of a convolution are cut: into boxes whose operands and sums stay in a core's own cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/conv2d.h"
#include "cpu/cut.h"

namespace fastres::cpu {

struct Box {
    Range images, rows, columns;
    int64_t pixels() const { return images.size() * rows.size() * columns.size(); }
};

// All images of batch x height x width in boxes of about `pixels` pixels: parts of a row, rows, or images.
class Boxes {
  public:
    Boxes(int64_t batch, Axes size, int64_t pixels) : batch_(batch), size_(size) {
        const auto parts = [](int64_t total, int64_t most) {
            return ceil_div(total, std::max<int64_t>(1, most));
        };
        columns_ = parts(size.w, pixels);
        rows_ = columns_ > 1 ? size.h : parts(size.h, pixels / size.w);
        images_ = rows_ > 1 ? batch : parts(batch, pixels / (size.h * size.w));
    }

    int64_t count() const { return images_ * rows_ * columns_; }

    Box operator[](int64_t index) const {
        return {part(batch_, images_, index / (rows_ * columns_)),
                part(size_.h, rows_, index / columns_ % rows_), part(size_.w, columns_, index % columns_)};
    }

    // As large as any of them: they differ by one row, column or image.
    Box largest() const {
        if (count() == 0) return {{0, 0}, {0, 0}, {0, 0}};
        const Box box = (*this)[0];
        return {{0, box.images.size() + 1}, {0, box.rows.size() + 1}, {0, box.columns.size() + 1}};
    }

  private:
    int64_t batch_;
    Axes size_;
    int64_t images_, rows_, columns_;
};

}  // namespace fastres::cpu
