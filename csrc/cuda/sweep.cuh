// The order in which the blocks of a launch visit an activation tensor, in either layout.
//
// The channels are cut into tiles, and what a tile has to visit into slices; a unit is one slice of one
// tile, and the blocks, as many as the device holds at a time, take the units in turn. A *position* is what
// a thread visits at once, one vector (or element) of the tensor:
//   channels last  one row of the thread's `width` channels. A block's threads stand `lanes` abreast on a
//   row's
//                  channels, so that a warp reads whole runs of memory.
//   contiguous     `width` pixels of the tile's only channel.
// A *group* is `unroll` positions for each thread of a block, whose loads are in flight together. The
// groups are dealt to the slices in turn, so that all blocks move through the tensor side by side; a second
// pass that goes backwards begins with what the first left in the L2 cache.
#pragma once

#include <algorithm>

#include "core/batch_norm.h"
#include "cuda/launch.h"
#include "cuda/storage.cuh"

namespace fastres::cuda {

struct Sweep {
    int64_t channels, pixels;
    int64_t positions;  // of one channel (or vector of channels)
    int64_t groups;     // that cover the positions
    int64_t tiles, slices;
    int lanes;  // threads side by side on the channels of a row; a power of two; 1 where contiguous

    // Contiguous only: from a thread's position to its next in a group, in whole planes and pixels beyond
    // them.
    int64_t step_planes, step_pixels;

    __host__ __device__ int64_t units() const { return tiles * slices; }
    __device__ int64_t tile(int64_t unit) const { return unit % tiles; }
    __device__ int64_t slice(int64_t unit) const { return unit / tiles; }
    __device__ int lane() const { return static_cast<int>(threadIdx.x) & (lanes - 1); }
};

// Slices that a tile of `tiles` is cut into, so that units fill the resident blocks evenly.
inline int64_t slices_for(int64_t tiles, int64_t groups, int64_t resident) {
    constexpr int64_t most_in_rounds = 32;
    const int64_t most = std::max<int64_t>(1, groups);
    if (tiles * 8 <= resident) return std::min(most, resident / tiles);
    // Few units a block: the last round of units may leave most blocks idle. Finer slices even it out; each
    // step up must gain 2 %, as more slices mean more partial sums.
    int64_t best = 1;
    double best_use = 0;
    for (int64_t slices = 1; slices <= std::min(most, most_in_rounds); ++slices) {
        const int64_t rounds = (tiles * slices + resident - 1) / resident;
        const double use = static_cast<double>(tiles * slices) / static_cast<double>(rounds * resident);
        if (use > best_use + 0.02) {
            best = slices;
            best_use = use;
        }
    }
    return best;
}

// A bound on slices_for(), whatever the kernel's occupancy is.
inline int64_t most_slices(int64_t tiles, int64_t groups) {
    return std::min(std::max<int64_t>(1, groups), std::max<int64_t>(most_resident_blocks() / tiles, 32));
}

// All but the slices.
inline Sweep sweep_of(const Activation& shape, int width, int unroll, int most_lanes) {
    Sweep sweep{};
    sweep.channels = shape.channels;
    sweep.pixels = shape.pixels;
    sweep.lanes = 1;
    int64_t tile_channels = 1;
    if (shape.channels_last) {
        while (sweep.lanes < most_lanes && sweep.lanes * width < shape.channels) sweep.lanes *= 2;
        tile_channels = int64_t{sweep.lanes} * width;
        sweep.positions = shape.rows();
    } else {
        sweep.positions = shape.rows() / width;
        const int64_t step = int64_t{kThreads} * width;
        sweep.step_planes = shape.pixels > 0 ? step / shape.pixels : 0;
        sweep.step_pixels = shape.pixels > 0 ? step % shape.pixels : 0;
    }
    sweep.tiles = (shape.channels + tile_channels - 1) / tile_channels;
    const int64_t group = int64_t{unroll} * (kThreads / sweep.lanes);
    sweep.groups = (sweep.positions + group - 1) / group;
    return sweep;
}

// For blocks of which the device holds `resident` at a time.
inline Sweep sweep_for(const Activation& shape, int width, int unroll, int64_t resident) {
    Sweep sweep = sweep_of(shape, width, unroll, kWarpThreads);
    sweep.slices = slices_for(sweep.tiles, sweep.groups, resident);
    return sweep;
}

// Whether the innermost dimension fills whole vectors.
inline bool fills_vectors(const Activation& shape) {
    return (shape.channels_last ? shape.channels : shape.pixels) * size_of(shape.dtype) % kVectorBytes == 0;
}

// ---------------------------------------------------------------------------------------------------------
// on the device

// Channels that one thread handles: consecutive from first_channel() on.
template <int width, bool channels_last>
inline constexpr int kThreadChannels = channels_last ? width : 1;

// A bound on `lanes`.
template <bool channels_last>
inline constexpr int kMostLanes = channels_last ? kWarpThreads : 1;

template <int channels>
__device__ __forceinline__ int64_t first_channel(const Sweep& sweep, int64_t tile) {
    return (tile * sweep.lanes + sweep.lane()) * channels;
}

template <int unroll>
struct Group {
    int64_t offset[unroll];  // of each position's first element
    int valid;               // the positions 0 .. valid - 1 lie in the tensor; at least one
};

enum class Order { forwards, backwards };

// Calls body(Group) for each group of a slice in which the calling thread has a position.
template <int width, bool channels_last, int unroll, Order order, class Body>
__device__ __forceinline__ void for_each_group(const Sweep& sweep, int64_t slice, int64_t channel,
                                               const Body& body) {
    if (channel >= sweep.channels) return;
    const int rows = kThreads / sweep.lanes;
    const int row = static_cast<int>(threadIdx.x) / sweep.lanes;
    for (int64_t turn = slice; turn < sweep.groups; turn += sweep.slices) {
        const int64_t index = order == Order::forwards ? turn : sweep.groups - 1 - turn;
        const int64_t position = index * unroll * rows + row;
        const int64_t left = sweep.positions - position;
        if (left <= 0) continue;
        Group<unroll> group;
        group.valid = left > (unroll - 1) * rows ? unroll : (static_cast<int>(left) + rows - 1) / rows;
        if constexpr (channels_last) {
            int64_t offset = position * sweep.channels + channel;
#pragma unroll
            for (int i = 0; i < unroll; ++i, offset += rows * sweep.channels) group.offset[i] = offset;
        } else {
            const int64_t element = position * width;
            // A division of 32 bits where it is enough: it takes a fifth of the instructions of one of 64.
            const int64_t plane = sweep.positions * width <= INT32_MAX
                                      ? static_cast<uint32_t>(element) / static_cast<uint32_t>(sweep.pixels)
                                      : element / sweep.pixels;
            int64_t pixel = element - plane * sweep.pixels;
            int64_t offset = (plane * sweep.channels + channel) * sweep.pixels + pixel;
            const int64_t plane_stride = sweep.channels * sweep.pixels;
            const int64_t step = sweep.step_planes * plane_stride + sweep.step_pixels;
#pragma unroll
            for (int i = 0; i < unroll; ++i) {
                group.offset[i] = offset;
                pixel += sweep.step_pixels;
                const bool wraps = pixel >= sweep.pixels;
                offset += step + (wraps ? plane_stride - sweep.pixels : 0);
                pixel -= wraps ? sweep.pixels : 0;
            }
        }
        body(group);
    }
}

}  // namespace fastres::cuda
