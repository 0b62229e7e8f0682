// The per-channel numbers of a kernel's map, computed once a block and handed to its threads' registers.
#pragma once

#include "core/bn_math.h"
#include "cuda/channel_vector.cuh"
#include "cuda/sweep.cuh"

namespace fastres::cuda {

// y -> (y - mean) * scale + shift
struct ForwardMap {
    float mean, scale, shift;
};

// The pre-activation. Forward and backward pass must agree in every bit of it, or a gradient would pass
// where the output was zero; hence the fused multiply-add by name, which no compiler flag changes.
__device__ __forceinline__ float normalize(float deviation, float scale, float shift) {
    return fmaf(deviation, scale, shift);
}

__device__ __forceinline__ ForwardMap forward_map(const ChannelVector& weight, const ChannelVector& bias,
                                                  int64_t channel, float mean, float rstd) {
    return {mean, read(weight, channel, 1.0f) * rstd, read(bias, channel, 0.0f)};
}

// Fills field[f][k] for the calling thread's channels with what find(channel, values) gives for values[f].
template <int fields, int channels, bool channels_last, class Find>
__device__ __forceinline__ void tile_coefficients(const Sweep& sweep, int64_t unit,
                                                  float (&field)[fields][channels], const Find& find) {
    __shared__ float staging[fields][channels * (channels_last ? kWarpThreads : 1)];
    const int64_t first = sweep.tile(unit) * sweep.lanes * channels;
    __syncthreads();  // a slower thread may still read the unit before
    for (int i = static_cast<int>(threadIdx.x); i < sweep.lanes * channels; i += kThreads) {
        if (first + i >= sweep.channels) break;
        float values[fields];
        find(first + i, values);
#pragma unroll
        for (int f = 0; f < fields; ++f) staging[f][i] = values[f];
    }
    __syncthreads();
    if (first_channel<channels>(sweep, sweep.tile(unit)) >= sweep.channels) return;
#pragma unroll
    for (int f = 0; f < fields; ++f)
#pragma unroll
        for (int k = 0; k < channels; ++k) field[f][k] = staging[f][sweep.lane() * channels + k];
}

}  // namespace fastres::cuda
