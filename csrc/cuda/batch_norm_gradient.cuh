// What the kernels of batch normalisation's gradient do with the values that they hold, wherever they hold
// them.
#pragma once

#include <limits>

#include "core/batch_norm.h"
#include "core/bn_math.h"
#include "cuda/channel_vector.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/storage.cuh"
#include "cuda/tile_coefficients.cuh"

namespace fastres::cuda {

// ReLU blocks the gradient of what lies up to a bound, and lets NaN's pass. Nothing lies up to this bound.
inline constexpr float kBlocksNothing = std::numeric_limits<float>::quiet_NaN();

template <class T>
inline constexpr float kStoredAsZero = bn_math::largest_stored_as_zero(Storage<T>::dtype);

__device__ __forceinline__ ForwardMap saved_map(const BnBackward& args, int64_t channel) {
    return forward_map(args.weight, args.bias, channel, static_cast<const float*>(args.save_mean)[channel],
                       static_cast<const float*>(args.save_rstd)[channel]);
}

// The calling thread's sums over what it visits of one unit.
template <int channels>
struct GradientSums {
    float grad[channels] = {}, dot[channels] = {};

    // Those of one position. dz becomes g; z is read where the mask is taken from the output, and `map`,
    // {mean, scale, shift}, gives it elsewhere.
    template <bool mask_from_output, class T, int width>
    __device__ __forceinline__ void mask_and_add(Pack<T, width>& dz, const Pack<T, width>& y,
                                                 const Pack<T, width>& z, const float (&map)[3][channels],
                                                 float blocked) {
        float grads[channels] = {}, products[channels] = {};
#pragma unroll
        for (int v = 0; v < width; ++v) {
            const int k = v % channels;
            const float deviation = y[v] - map[0][k];
            const float above = mask_from_output ? z[v] : normalize(deviation, map[1][k], map[2][k]);
            const float g = above <= blocked ? 0.0f : dz[v];
            grads[k] += g;
            products[k] += g * deviation;
            dz.set(v, g);
        }
#pragma unroll
        for (int k = 0; k < channels; ++k) {
            grad[k] += grads[k];
            dot[k] += products[k];
        }
    }

    __device__ __forceinline__ void widened(double (&sums)[2 * channels]) const {
#pragma unroll
        for (int k = 0; k < channels; ++k) {
            sums[k] = grad[k];
            sums[channels + k] = dot[k];
        }
    }
};

struct GradientCoefficients {
    float mean_grad, slope;
};

// Those of a channel, from its sums. One thread of the launch `saves` the parameters' gradients.
__device__ __forceinline__ GradientCoefficients gradient_coefficients(const BnBackward& args,
                                                                      int64_t channel, TwoSums sums,
                                                                      bool saves) {
    const auto k = bn_math::backward_coefficients<double>(
        read(args.weight, channel, 1.0f), static_cast<const float*>(args.save_rstd)[channel], sums.first,
        sums.second, static_cast<double>(args.shape.batch * args.shape.pixels), args.training);
    if (saves) {
        static_cast<float*>(args.grad_weight)[channel] = static_cast<float>(k.dgamma);
        static_cast<float*>(args.grad_bias)[channel] = static_cast<float>(k.dbeta);
    }
    return {static_cast<float>(k.mean_grad), static_cast<float>(k.slope)};
}

// map: {mean, scale, shift, mean_grad, slope}.
template <int channels>
__device__ __forceinline__ float input_gradient(float g, float deviation, const float (&map)[5][channels],
                                                int k) {
    return map[1][k] * (g - map[3][k] - deviation * map[4][k]);
}

}  // namespace fastres::cuda
