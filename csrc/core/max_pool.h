// The shape of a two-dimensional maximum over windows.
#pragma once

#include <cstdint>

#include "core/conv2d.h"

namespace fastres {

// Of channels-last images, padded with what no maximum is. Each window meets the image.
struct MaxPool2d {
    int64_t batch;
    Axes in, out;  // pixels
    Axes kernel, stride, padding;

    // The index of a window's pixel is row * kernel.w + column, in one byte.
    static constexpr int64_t most_taps = 256;
};

}  // namespace fastres
