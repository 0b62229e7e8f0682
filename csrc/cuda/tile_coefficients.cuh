// The per-channel numbers of a kernel's map, computed once a block and handed to its threads' registers.
#pragma once

#include "core/batch_norm.h"
#include "core/bn_math.h"
#include "cuda/channel_vector.cuh"
#include "cuda/shared.cuh"
#include "cuda/sweep.cuh"

namespace fastres::cuda {

// y -> (y - mean) * scale + shift
struct ForwardMap {
    float mean, scale, shift;

    template <int fields>
    __device__ __forceinline__ void put_first(float (&values)[fields]) const {
        values[0] = mean;
        values[1] = scale;
        values[2] = shift;
    }
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

// What a forward pass applies to a channel: by the running statistics, which it saves where it is the first
// to see them, or by those that were saved before.
__device__ __forceinline__ ForwardMap map_to_apply(const BnForward& args, int64_t channel, bool saves) {
    float* save_mean = static_cast<float*>(args.save_mean);
    float* save_rstd = static_cast<float*>(args.save_rstd);
    if (args.statistics != Statistics::running)
        return forward_map(args.weight, args.bias, channel, save_mean[channel], save_rstd[channel]);
    const float mean = read(args.running_mean, channel, 0.0f);
    const float rstd = static_cast<float>(
        bn_math::reciprocal_std<double>(read(args.running_var, channel, 1.0f), args.eps));
    if (saves) {
        save_mean[channel] = mean;
        save_rstd[channel] = rstd;
    }
    return forward_map(args.weight, args.bias, channel, mean, rstd);
}

// Fills field[f][k] for the calling thread's channels with what find(channel, values) gives for values[f].
template <int fields, int channels, int most_lanes, class Find>
__device__ __forceinline__ void tile_coefficients(const Sweep& sweep, int64_t unit,
                                                  float (&field)[fields][channels], const Find& find) {
    struct Staging;
    constexpr int most = channels * most_lanes;
    float* staging = shared_array<Staging, float, fields * most>();
    const int64_t first = sweep.tile(unit) * sweep.lanes * channels;
    __syncthreads();  // a slower thread may still read the unit before
    for (int i = static_cast<int>(threadIdx.x); i < sweep.lanes * channels; i += kThreads) {
        if (first + i >= sweep.channels) break;
        float values[fields];
        find(first + i, values);
#pragma unroll
        for (int f = 0; f < fields; ++f) staging[f * most + i] = values[f];
    }
    __syncthreads();
    if (first_channel<channels>(sweep, sweep.tile(unit)) >= sweep.channels) return;
#pragma unroll
    for (int f = 0; f < fields; ++f)
#pragma unroll
        for (int k = 0; k < channels; ++k) field[f][k] = staging[f * most + sweep.lane() * channels + k];
}

}  // namespace fastres::cuda
