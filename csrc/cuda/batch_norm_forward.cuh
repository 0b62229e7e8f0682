// What the kernels of batch normalisation's forward pass do with the values that they hold, wherever they
// hold them.
//
// Sums of squares lose digits where the mean is far from zero, so that nothing here sums y or y^2. Each
// thread sums deviations from the mean of its first few values, in float: no value, and no place in the
// image, that is far from the rest can spoil more than its own thread's share. Its sums are then moved, in
// double, to one origin for the whole channel, the channel's first value, and from there on partial sums
// simply add.
#pragma once

#include <limits>
#include <type_traits>

#include "core/batch_norm.h"
#include "core/bn_math.h"
#include "cuda/channel_vector.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/storage.cuh"
#include "cuda/tile_coefficients.cuh"

namespace fastres::cuda {

// Nothing is below it. NaN is below no floor and passes, as through PyTorch's ReLU.
inline constexpr float kNoFloor = -std::numeric_limits<float>::infinity();

// Where a channel's first value lies.
__device__ __forceinline__ int64_t first_value(const Activation& shape, int64_t channel) {
    return shape.channels_last ? channel : channel * shape.pixels;
}

// The calling thread's sums over what it visits of one unit.
template <int channels>
struct Deviations {
    float origin[channels] = {}, sum[channels] = {}, squares[channels] = {};
    int count = 0;

    // Of a group, whose first `valid` positions are there.
    template <class T, int width, int unroll>
    __device__ __forceinline__ void add(const Pack<T, width> (&y)[unroll], int valid) {
        constexpr int values_a_channel = width / channels;
        if (count == 0) {
#pragma unroll
            for (int i = 0; i < unroll; ++i)
                if (i < valid)
#pragma unroll
                    for (int v = 0; v < width; ++v) origin[v % channels] += y[i][v];
            const float share = 1.0f / static_cast<float>(valid * values_a_channel);
#pragma unroll
            for (int k = 0; k < channels; ++k) origin[k] *= share;
        }
        count += valid * values_a_channel;
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            if (i >= valid) continue;
            float deviations[channels] = {}, deviations_squared[channels] = {};
#pragma unroll
            for (int v = 0; v < width; ++v) {
                const float deviation = y[i][v] - origin[v % channels];
                deviations[v % channels] += deviation;
                deviations_squared[v % channels] += deviation * deviation;
            }
#pragma unroll
            for (int k = 0; k < channels; ++k) {
                sum[k] += deviations[k];
                squares[k] += deviations_squared[k];
            }
        }
    }

    // {sum(y - a), sum((y - a)^2)} of each channel, a being the channel's first value.
    template <class T>
    __device__ __forceinline__ void about_first_value(const T* input, const Activation& shape,
                                                      int64_t first_channel,
                                                      double (&sums)[2 * channels]) const {
#pragma unroll
        for (int k = 0; k < channels; ++k) {
            sums[k] = sums[channels + k] = 0;
            if (count == 0) continue;
            // from those about b, with step = b - a
            const double step =
                double{origin[k]} - double{widen(input[first_value(shape, first_channel + k)])};
            sums[k] = sum[k] + count * step;
            sums[channels + k] = squares[k] + step * (2.0 * sum[k] + count * step);
        }
    }
};

struct BatchStatistics {
    float mean, rstd;
};

// Those of a channel, from its sums about its first value. One thread of the launch `saves` them, and moves
// the running ones.
__device__ __forceinline__ BatchStatistics batch_statistics(const BnForward& args, int64_t channel,
                                                            TwoSums sums, bool saves) {
    const int64_t rows = args.shape.batch * args.shape.pixels;
    const ChannelVector input{const_cast<void*>(args.input), args.shape.dtype};
    const double origin = rows > 0 ? read(input, first_value(args.shape, channel), 0.0f) : 0.0f;
    const auto batch =
        bn_math::from_shifted_sums<double>(static_cast<double>(rows), origin, sums.first, sums.second);
    const BatchStatistics found{static_cast<float>(batch.mean), static_cast<float>(bn_math::reciprocal_std(
                                                                    batch.m2 / batch.count, args.eps))};
    if (!saves) return found;
    if (args.running_mean.data)
        write(args.running_mean, channel,
              static_cast<float>(bn_math::running_update<double>(read(args.running_mean, channel, 0.0f),
                                                                 batch.mean, args.momentum)));
    if (args.running_var.data)
        write(
            args.running_var, channel,
            static_cast<float>(bn_math::running_update<double>(
                read(args.running_var, channel, 1.0f), bn_math::unbiased_variance(batch), args.momentum)));
    static_cast<float*>(args.save_mean)[channel] = found.mean;
    static_cast<float*>(args.save_rstd)[channel] = found.rstd;
    return found;
}

// act((y - mean) * scale + shift [+ addend]), map being {mean, scale, shift}.
template <bool add_residual, class T, int width, int channels>
__device__ __forceinline__ Pack<T, width> normalized(const Pack<T, width>& y, const Pack<T, width>& addend,
                                                     const float (&map)[3][channels], float floor) {
    Pack<T, width> result;
#pragma unroll
    for (int v = 0; v < width; ++v) {
        const int k = v % channels;
        float z = normalize(y[v] - map[0][k], map[1][k], map[2][k]);
        if constexpr (add_residual) z += addend[v];
        result.set(v, z < floor ? floor : z);
    }
    return result;
}

// Calls body(Access, channels_last) for what the pointers and the shape allow.
template <class Body>
void with_input(const BnForward& args, bool aligned, const Body& body) {
    check_dtype(args.weight, "weight");
    check_dtype(args.bias, "bias");
    check_dtype(args.running_mean, "running_mean");
    check_dtype(args.running_var, "running_var");
    with_access(args.shape.dtype, aligned && fills_vectors(args.shape), [&](auto access) {
        if (args.shape.channels == 0) return;
        args.shape.channels_last ? body(access, std::true_type{}) : body(access, std::false_type{});
    });
}

}  // namespace fastres::cuda
