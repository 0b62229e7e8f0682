// Grouped convolutions, as in ResNeXt: which of them the kernels run, and how lanes find their groups.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/conv2d.h"
#include "cpu/conv_kernels.h"
#include "cpu/isa.h"

namespace fastres::cpu {

// Groups have as many channels of the input as of the output: a power of two, so that vectors hold whole
// groups or groups whole vectors, and no more than a block.
inline bool covers_groups(const ConvKernels& kernels, int64_t in_channels, int64_t out_channels,
                          int64_t groups) {
    if (in_channels < 1 || out_channels < 1) return false;
    if (groups == 1) return true;
    const int64_t channels = in_channels / groups;
    const bool power_of_two = (channels & (channels - 1)) == 0;
    return in_channels == out_channels && power_of_two && channels >= 4 && channels <= kernels.block;
}

// [word][lane]: where each word of a lane's group lies, from the first of the vector's groups on. Of a
// group larger than a vector, from the vector of words on that it lies in.
inline std::vector<int32_t> group_words(const ConvKernels& kernels, int64_t channels, int64_t words) {
    const int64_t lanes = lanes_of(kernels);
    std::vector<int32_t> table;
    for (int64_t word = 0; word < std::min(words, lanes); ++word)
        for (int64_t lane = 0; lane < lanes; ++lane)
            table.push_back(static_cast<int32_t>(lane / channels * words + word));
    return table;
}

// The first channel of the groups that the vector from `channel` on belongs to.
inline int64_t first_of_group(int64_t channel, int64_t channels) {
    return channel / channels * channels;
}

}  // namespace fastres::cpu
