// Batch norm in training needs its input twice, its gradient needs two tensors twice. Where a tensor fits
// into the shared memory of all multiprocessors together, one launch reads it once: each block keeps its
// share from the statistics to their use, with a barrier of the whole grid between them. This is the rule
// for which tensors do, and the shape of that launch.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/sweep.cuh"

namespace fastres::cuda {

struct OnChip {
    Sweep sweep;
    int64_t blocks;
    int64_t dynamic_bytes;  // of shared memory a block
};

// Channels of a tile at most. Each block adds up the partial sums of its tile itself, over all slices:
// fewer channels mean fewer sums, more mean longer runs of memory. With 32 they are 64 bytes in half
// precision and 128 in float32, and at 132 blocks and 64 channels a block adds up 34 kB, out of L2.
inline constexpr int kOnChipTileChannels = 32;
template <int width, bool channels_last>
inline constexpr int kOnChipLanes = channels_last ? kOnChipTileChannels / width : 1;

// The launch of a `kernel` that keeps `tensors` of this shape and visits them in groups of `unroll`
// vectors; none where they do not fit, or must not: see use_on_chip().
std::optional<OnChip> on_chip(const Activation& shape, int width, int unroll, int tensors,
                              const AnyKernel& kernel);

}  // namespace fastres::cuda
