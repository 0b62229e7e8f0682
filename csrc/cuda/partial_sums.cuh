// Two sums a channel, added up from threads to blocks and from blocks to the whole tensor, in a fixed
// order.
//
// Threads sum in float over the few values that each of them visits; from there on all is double, which
// costs nothing at this rate and makes the result as good as its last rounding. partials is
// [slices][2][channels].
#pragma once

#include "cuda/shared.cuh"
#include "cuda/sweep.cuh"

namespace fastres::cuda {

// Adds value[i] over the threads that agree in threadIdx.x % lanes. Returns shared memory that holds the
// total at [i * lanes + lane], valid for all threads until they call it again. `most_lanes` bounds `lanes`.
template <int n, int most_lanes>
__device__ __forceinline__ const double* block_sum(double (&value)[n], int lanes) {
    struct Staging;
    double* staging = shared_array<Staging, double, kWarps * n * most_lanes>();
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    for (int distance = kWarpThreads / 2; distance >= lanes; distance /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], distance);
    __syncthreads();  // the totals of the call before may still be read
    if (lane < lanes)
#pragma unroll
        for (int i = 0; i < n; ++i) staging[(warp * n + i) * lanes + lane] = value[i];
    __syncthreads();
    for (int column = thread; column < n * lanes; column += kThreads) {
        double total = staging[column];
        for (int w = 1; w < kWarps; ++w) total += staging[w * n * lanes + column];
        staging[column] = total;
    }
    __syncthreads();
    return staging;
}

// Stores a unit's sums: value is the thread's {first[channels], second[channels]}.
template <int channels, int most_lanes>
__device__ __forceinline__ void store_partial_sums(const Sweep& sweep, int64_t unit,
                                                   double (&value)[2 * channels], double* partials) {
    const double* totals = block_sum<2 * channels, most_lanes>(value, sweep.lanes);
    const int64_t first = sweep.tile(unit) * sweep.lanes * channels;
    double* slice = partials + 2 * sweep.slice(unit) * sweep.channels;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * sweep.lanes * channels; i += kThreads) {
        const int which = i / (sweep.lanes * channels);
        const int at = i % (sweep.lanes * channels);  // channel of the tile
        const int lane = at / channels;
        if (first + at < sweep.channels)
            slice[which * sweep.channels + first + at] =
                totals[(which * channels + at % channels) * sweep.lanes + lane];
    }
}

// ---------------------------------------------------------------------------------------------------------
// The second step: a block takes a few channels, and deals their slices to its other threads.

// Channels of a block, where a kernel does nothing else.
inline constexpr int kFinalChannels = 8;

struct TwoSums {
    double first, second;
};

// The sums of channel first + threadIdx.x; for the first `lanes` threads to use.
template <int lanes>
__device__ __forceinline__ TwoSums total_sums(const double* partials, int64_t slices, int64_t channels,
                                              int64_t first) {
    const int lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t channel = first + lane;
    double value[2] = {0, 0};
    if (channel < channels)
#pragma unroll 4
        for (int64_t slice = threadIdx.x / lanes; slice < slices; slice += kThreads / lanes) {
            value[0] += partials[2 * slice * channels + channel];
            value[1] += partials[(2 * slice + 1) * channels + channel];
        }
    const double* totals = block_sum<2, lanes>(value, lanes);
    return {totals[lane], totals[lanes + lane]};
}

inline int64_t final_blocks(int64_t channels) {
    return (channels + kFinalChannels - 1) / kFinalChannels;
}

// The kernels that write partials unroll no less.
inline constexpr int kLeastUnroll = 2;

// Bytes of partials, whatever kernel writes them.
inline int64_t partial_bytes(const Activation& shape) {
    int64_t slices = 1;
    for (const int width : {1, 4, 8}) {
        const Sweep sweep = sweep_of(shape, width, kLeastUnroll, kWarpThreads);
        slices = std::max(slices, most_slices(sweep.tiles, sweep.groups));
    }
    return slices * 2 * shape.channels * static_cast<int64_t>(sizeof(double));
}

}  // namespace fastres::cuda
