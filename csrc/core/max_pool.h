// What a kernel of batch norm, ReLU and the maximum over windows behind them is asked to do.
#pragma once

#include <cstdint>

#include "core/batch_norm.h"
#include "core/conv2d.h"

namespace fastres {

// The shape of a two-dimensional maximum over windows of channels-last images, padded with what no maximum
// is. Each window meets the image.
struct MaxPool2d {
    int64_t batch;
    Axes in, out;  // pixels
    Axes kernel, stride, padding;

    // The index of a window's pixel is row * kernel.w + column, in one byte.
    static constexpr int64_t most_taps = 256;
};

// maximum(relu(batch_norm(input))). `norm` has no residual and no output.
struct BnMaxPoolForward {
    BnForward norm;
    MaxPool2d pool;
    void* output;
    uint8_t* index;  // like output: which pixel of its window is the first largest one
};

// `norm` has no grad.
struct BnMaxPoolBackward {
    BnBackward norm;
    MaxPool2d pool;
    const void* grad;
    const uint8_t* index;
};

}  // namespace fastres
