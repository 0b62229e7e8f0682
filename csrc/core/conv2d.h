// The shape of a convolution, and where its weights lie.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastres {

// A pair of numbers for the two axes of an image.
struct Axes {
    int64_t h, w;
};

// Images are zero-padded at their borders. Channels are those of all groups.
struct Conv2d {
    int64_t batch, in_channels, out_channels, groups;
    Axes in, out;  // pixels
    Axes kernel, stride, padding, dilation;
};

// (out_channels, in_channels / groups, kernel.h, kernel.w) in any order of memory: elements from one to the
// next.
struct ConvWeight {
    void* data;
    Dtype dtype;
    int64_t stride_out, stride_in, stride_h, stride_w;
};

}  // namespace fastres
