// The kernels of batch normalisation's gradient, with the activation's and the residual's gradients
// (g = grad * [z > 0]):
//     reduce          grad, input [, output] -> sum(g) and sum(g * (y - mean)) a channel and slice
//                     [, grad_residual]
//     parameter_grad  sums -> grad_weight, grad_bias, coefficients of the next (one value a channel)
//     input_grad      grad (or grad_residual), input -> grad_input
// In evaluation the statistics are constants: reduce writes grad_input as well, and input_grad does not
// run.
//
// Where `grad` comes from is a parameter: Source::load(offset, Pack&) gives what lies at an element.
#pragma once

#include <limits>

#include "core/bn_math.h"
#include "cuda/batch_norm.h"
#include "cuda/channel_vector.cuh"
#include "cuda/kernel_list.h"
#include "cuda/partial_sums.cuh"
#include "cuda/storage.cuh"
#include "cuda/sweep.cuh"
#include "cuda/tile_coefficients.cuh"

namespace fastres::cuda {

// The gradient of the activation, as it is in memory.
template <class T>
struct StoredGrad {
    // Two or three tensors are loaded at once: so many positions of each, or one less of three, fit into
    // 128 registers.
    static constexpr int unroll = 4;
    static constexpr bool behind_residual = true;

    const T* grad;

    template <int width>
    __device__ __forceinline__ void load(int64_t offset, Pack<T, width>& dz) const {
        dz.load(grad + offset);
    }
};

struct Coefficients {
    float* mean_grad;  // [channels]
    float* slope;      // [channels]
};

// ReLU blocks the gradient of what lies up to a bound, and lets NaN's pass. Nothing lies up to this bound.
inline constexpr float kBlocksNothing = std::numeric_limits<float>::quiet_NaN();

template <class T>
inline constexpr float kStoredAsZero = bn_math::largest_stored_as_zero(Storage<T>::dtype);

__device__ __forceinline__ ForwardMap saved_map(const BnBackward& args, int64_t channel) {
    return forward_map(args.weight, args.bias, channel, static_cast<const float*>(args.save_mean)[channel],
                       static_cast<const float*>(args.save_rstd)[channel]);
}

template <class T, int width, bool channels_last, bool mask_from_output, class Source>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    reduce(Sweep sweep, BnBackward args, Source grad, double* partials) {
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int unroll = mask_from_output ? Source::unroll - 1 : Source::unroll;
    const T* input = static_cast<const T*>(args.input);
    const T* output = static_cast<const T*>(args.output);
    T* grad_residual = static_cast<T*>(args.grad_residual);
    T* grad_input = args.training ? nullptr : static_cast<T*>(args.grad_input);
    const float blocked = mask_from_output ? 0.0f : args.relu ? kStoredAsZero<T> : kBlocksNothing;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][channels];  // mean, scale, shift
        tile_coefficients<3, channels, channels_last>(sweep, unit, map, [&](int64_t c, float (&values)[3]) {
            const ForwardMap forward = saved_map(args, c);
            values[0] = forward.mean;
            values[1] = forward.scale;
            values[2] = forward.shift;
        });
        float sum_grad[channels] = {}, dot[channels] = {};
        for_each_group<width, channels_last, unroll, Order::forwards>(
            sweep, sweep.slice(unit), first_channel<channels>(sweep, sweep.tile(unit)),
            [&](const Group<unroll>& group) {
                Pack<T, width> dz[unroll], y[unroll], z[unroll];
#pragma unroll
                for (int i = 0; i < unroll; ++i) {
                    if (i >= group.valid) continue;
                    grad.load(group.offset[i], dz[i]);
                    y[i].load(input + group.offset[i]);
                    if constexpr (mask_from_output) z[i].load(output + group.offset[i]);
                }
#pragma unroll
                for (int i = 0; i < unroll; ++i) {
                    if (i >= group.valid) continue;
                    float grads[channels] = {}, products[channels] = {};
                    Pack<T, width> scaled;
#pragma unroll
                    for (int v = 0; v < width; ++v) {
                        const int k = v % channels;
                        const float deviation = y[i][v] - map[0][k];
                        const float above =
                            mask_from_output ? z[i][v] : normalize(deviation, map[1][k], map[2][k]);
                        const float g = above <= blocked ? 0.0f : dz[i][v];
                        grads[k] += g;
                        products[k] += g * deviation;
                        dz[i].set(v, g);
                        scaled.set(v, g * map[1][k]);
                    }
                    if (grad_residual) dz[i].store(grad_residual + group.offset[i]);
                    if (grad_input) scaled.store(grad_input + group.offset[i]);
#pragma unroll
                    for (int k = 0; k < channels; ++k) {
                        sum_grad[k] += grads[k];
                        dot[k] += products[k];
                    }
                }
            });
        double sums[2 * channels];
#pragma unroll
        for (int k = 0; k < channels; ++k) {
            sums[k] = sum_grad[k];
            sums[channels + k] = dot[k];
        }
        store_partial_sums<channels, channels_last>(sweep, unit, sums, partials);
    }
}

static __global__ void __launch_bounds__(kThreads)
    parameter_grad(BnBackward args, const double* partials, int64_t slices, Coefficients coefficients) {
    const TwoSums sums = total_sums(partials, slices, args.shape.channels);
    const int64_t channel = int64_t{blockIdx.x} * kFinalChannels + threadIdx.x;
    if (threadIdx.x >= kFinalChannels || channel >= args.shape.channels) return;
    const auto k = bn_math::backward_coefficients<double>(
        read(args.weight, channel, 1.0f), static_cast<const float*>(args.save_rstd)[channel], sums.first,
        sums.second, static_cast<double>(args.shape.batch * args.shape.pixels), args.training);
    static_cast<float*>(args.grad_weight)[channel] = static_cast<float>(k.dgamma);
    static_cast<float*>(args.grad_bias)[channel] = static_cast<float>(k.dbeta);
    coefficients.mean_grad[channel] = static_cast<float>(k.mean_grad);
    coefficients.slope[channel] = static_cast<float>(k.slope);
}

template <class T, int width, bool channels_last, class Source>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    input_grad(Sweep sweep, BnBackward args, Source grad, bool masked_already, Coefficients coefficients) {
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int unroll = Source::unroll;
    const T* input = static_cast<const T*>(args.input);
    T* grad_input = static_cast<T*>(args.grad_input);
    const float blocked = args.relu && !masked_already ? kStoredAsZero<T> : kBlocksNothing;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[5][channels];  // mean, scale, shift, mean_grad, slope
        tile_coefficients<5, channels, channels_last>(sweep, unit, map, [&](int64_t c, float (&values)[5]) {
            const ForwardMap forward = saved_map(args, c);
            values[0] = forward.mean;
            values[1] = forward.scale;
            values[2] = forward.shift;
            values[3] = coefficients.mean_grad[c];
            values[4] = coefficients.slope[c];
        });
        for_each_group<width, channels_last, unroll, Order::backwards>(
            sweep, sweep.slice(unit), first_channel<channels>(sweep, sweep.tile(unit)),
            [&](const Group<unroll>& group) {
                Pack<T, width> dz[unroll], y[unroll];
#pragma unroll
                for (int i = 0; i < unroll; ++i) {
                    if (i >= group.valid) continue;
                    grad.load(group.offset[i], dz[i]);
                    y[i].load(input + group.offset[i]);
                }
#pragma unroll
                for (int i = 0; i < unroll; ++i) {
                    if (i >= group.valid) continue;
                    Pack<T, width> dy;
#pragma unroll
                    for (int v = 0; v < width; ++v) {
                        const int k = v % channels;
                        const float deviation = y[i][v] - map[0][k];
                        const float above = normalize(deviation, map[1][k], map[2][k]);
                        const float g = above <= blocked ? 0.0f : dz[i][v];
                        dy.set(v, map[1][k] * (g - map[3][k] - deviation * map[4][k]));
                    }
                    dy.store(grad_input + group.offset[i]);
                }
            });
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// `after` is what the second pass takes for the gradient: it is masked already where `masked_already`.
template <class Access, bool channels_last, class Source>
void run(const BnBackward& args, const Source& grad, const Source& after, bool masked_already,
         void* workspace, Stream stream) {
    using T = typename Access::Element;
    constexpr int width = Access::width;
    const Activation& shape = args.shape;
    double* partials = static_cast<double*>(workspace);
    float* behind = reinterpret_cast<float*>(static_cast<char*>(workspace) + partial_bytes(shape));
    const Coefficients coefficients{behind, behind + shape.channels};

    auto first = reduce<T, width, channels_last, false, Source>;
    int unroll = Source::unroll;
    if constexpr (Source::behind_residual) {
        if (args.relu && args.output) {
            first = reduce<T, width, channels_last, true, Source>;
            unroll -= 1;
        }
    }
    static_assert(Source::unroll - Source::behind_residual >= kLeastUnroll);
    const int64_t first_resident = resident_blocks(reinterpret_cast<const void*>(first));
    const Sweep sweep = sweep_of(shape, width, unroll, first_resident);
    launch(kernel::kReduce, first, std::min(sweep.units(), first_resident), stream, sweep, args, grad,
           partials);
    launch(kernel::kParameterGrad, parameter_grad, final_blocks(shape.channels), stream, args, partials,
           sweep.slices, coefficients);
    if (!args.training) return;  // grad_input was written by reduce

    const auto second = input_grad<T, width, channels_last, Source>;
    const int64_t second_resident = resident_blocks(reinterpret_cast<const void*>(second));
    const Sweep back = sweep_of(shape, width, Source::unroll, second_resident);
    launch(kernel::kInputGrad, second, std::min(back.units(), second_resident), stream, back, args, after,
           masked_already, coefficients);
}

}  // namespace fastres::cuda
