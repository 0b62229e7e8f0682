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

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_gradient.cuh"
#include "cuda/kernel_list.h"
#include "cuda/storage.cuh"
#include "cuda/sweep.cuh"

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

// ---------------------------------------------------------------------------------------------------------
// kernels

template <class T, int width, bool channels_last, bool mask_from_output, class Source>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    reduce(Sweep sweep, BnBackward args, Source grad, double* partials) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int unroll = mask_from_output ? Source::unroll - 1 : Source::unroll;
    const T* input = static_cast<const T*>(args.input);
    const T* output = static_cast<const T*>(args.output);
    T* grad_residual = static_cast<T*>(args.grad_residual);
    T* grad_input = args.training ? nullptr : static_cast<T*>(args.grad_input);
    const float blocked = mask_from_output ? 0.0f : args.relu ? kStoredAsZero<T> : kBlocksNothing;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][channels];  // mean, scale, shift
        tile_coefficients<3, channels, kMostLanes<channels_last>>(
            sweep, unit, map, [&](int64_t c, float (&values)[3]) { saved_map(args, c).put_first(values); });
        GradientSums<channels> sums;
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
                    sums.template mask_and_add<mask_from_output>(dz[i], y[i], z[i], map, blocked);
                    if (grad_residual) dz[i].store(grad_residual + group.offset[i]);
                    if (!grad_input) continue;
                    Pack<T, width> scaled;
#pragma unroll
                    for (int v = 0; v < width; ++v) scaled.set(v, dz[i][v] * map[1][v % channels]);
                    scaled.store(grad_input + group.offset[i]);
                }
            });
        double widened[2 * channels];
        sums.widened(widened);
        store_partial_sums<channels, kMostLanes<channels_last>>(sweep, unit, widened, partials);
    }
}

static __global__ void __launch_bounds__(kThreads)
    parameter_grad(BnBackward args, const double* partials, int64_t slices, Coefficients coefficients) {
    begin_in_stream_order();
    const int64_t first = int64_t{blockIdx.x} * kFinalChannels;
    const TwoSums sums = total_sums<kFinalChannels>(partials, slices, args.shape.channels, first);
    const int64_t channel = first + threadIdx.x;
    if (threadIdx.x >= kFinalChannels || channel >= args.shape.channels) return;
    const GradientCoefficients found = gradient_coefficients(args, channel, sums, true);
    coefficients.mean_grad[channel] = found.mean_grad;
    coefficients.slope[channel] = found.slope;
}

template <class T, int width, bool channels_last, class Source>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    input_grad(Sweep sweep, BnBackward args, Source grad, bool masked_already, Coefficients coefficients) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int unroll = Source::unroll;
    const T* input = static_cast<const T*>(args.input);
    T* grad_input = static_cast<T*>(args.grad_input);
    const float blocked = args.relu && !masked_already ? kStoredAsZero<T> : kBlocksNothing;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[5][channels];  // mean, scale, shift, mean_grad, slope
        tile_coefficients<5, channels, kMostLanes<channels_last>>(sweep, unit, map,
                                                                  [&](int64_t c, float (&values)[5]) {
                                                                      saved_map(args, c).put_first(values);
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
                        dy.set(v, input_gradient(g, deviation, map, k));
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

    Kernel first{kernel::kReduce, reduce<T, width, channels_last, false, Source>};
    int unroll = Source::unroll;
    if constexpr (Source::behind_residual) {
        if (args.relu && args.output) {
            first.function = reduce<T, width, channels_last, true, Source>;
            unroll -= 1;
        }
    }
    static_assert(Source::unroll - Source::behind_residual >= kLeastUnroll);
    const int64_t first_resident = resident_blocks(first);
    const Sweep sweep = sweep_for(shape, width, unroll, first_resident);
    launch(first, std::min(sweep.units(), first_resident), stream, sweep, args, grad, partials);
    launch(Kernel{kernel::kParameterGrad, parameter_grad}, final_blocks(shape.channels), stream, args,
           partials, sweep.slices, coefficients);
    if (!args.training) return;  // grad_input was written by reduce

    const Kernel second{kernel::kInputGrad, input_grad<T, width, channels_last, Source>};
    const int64_t second_resident = resident_blocks(second);
    const Sweep back = sweep_for(shape, width, Source::unroll, second_resident);
    launch(second, std::min(back.units(), second_resident), stream, back, args, after, masked_already,
           coefficients);
}

// Of gradients as they are in memory. Each layout is compiled in a file of its own: nvcc takes its time.
template <bool channels_last>
void batch_norm_backward_in(const BnBackward& args, void* workspace, Stream stream) {
    const bool vectors = fills_vectors(args.shape) && vector_aligned({args.grad, args.input, args.output,
                                                                      args.grad_input, args.grad_residual});
    with_access(args.shape.dtype, vectors, [&](auto access) {
        using A = decltype(access);
        using T = typename A::Element;
        if (args.shape.channels == 0 || batch_norm_backward_on_chip(args, workspace, stream)) return;
        const bool masked = args.grad_residual != nullptr;
        const StoredGrad<T> grad{static_cast<const T*>(args.grad)};
        const StoredGrad<T> after{static_cast<const T*>(masked ? args.grad_residual : args.grad)};
        run<A, channels_last>(args, grad, after, masked, workspace, stream);
    });
}
extern template void batch_norm_backward_in<true>(const BnBackward&, void*, Stream);
extern template void batch_norm_backward_in<false>(const BnBackward&, void*, Stream);

}  // namespace fastres::cuda
