// Batch normalisation forward, with the residual and the activation behind it:
//     moments     input -> two sums a channel and slice
//     statistics  sums -> mean, rstd, running statistics                          (one value a channel)
//     apply       input [, residual] -> output
// In evaluation apply runs alone.
//
// Sums of squares lose digits where the mean is far from zero, so that nothing here sums y or y^2. Each
// thread sums deviations from the mean of its first few values, in float: no value, and no place in the
// image, that is far from the rest can spoil more than its own thread's share. Its sums are then moved, in
// double, to one origin for the whole channel, the channel's first value, and from there on partial sums
// simply add.
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/bn_math.h"
#include "cuda/batch_norm.h"
#include "cuda/channel_vector.cuh"
#include "cuda/kernel_list.h"
#include "cuda/partial_sums.cuh"
#include "cuda/storage.cuh"
#include "cuda/sweep.cuh"
#include "cuda/tile_coefficients.cuh"

namespace fastres::cuda {
namespace {

constexpr int kMomentsUnroll = 8;
constexpr int kApplyUnroll = 4;
static_assert(kMomentsUnroll >= kLeastUnroll);

// Nothing is below it. NaN is below no floor and passes, as through PyTorch's ReLU.
constexpr float kNoFloor = -std::numeric_limits<float>::infinity();

// Where a channel's first value lies.
__device__ __forceinline__ int64_t first_value(const Activation& shape, int64_t channel) {
    return shape.channels_last ? channel : channel * shape.pixels;
}

// ---------------------------------------------------------------------------------------------------------
// kernels

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    moments(Sweep sweep, BnForward args, double* partials) {
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int values_a_channel = width / channels;
    const T* input = static_cast<const T*>(args.input);
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        const int64_t channel = first_channel<channels>(sweep, sweep.tile(unit));
        float origin[channels] = {}, sum[channels] = {}, squares[channels] = {};
        int count = 0;
        for_each_group<width, channels_last, kMomentsUnroll, Order::forwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<kMomentsUnroll>& group) {
                Pack<T, width> y[kMomentsUnroll];
#pragma unroll
                for (int i = 0; i < kMomentsUnroll; ++i)
                    if (i < group.valid) y[i].load(input + group.offset[i]);
                if (count == 0) {
#pragma unroll
                    for (int i = 0; i < kMomentsUnroll; ++i)
                        if (i < group.valid)
#pragma unroll
                            for (int v = 0; v < width; ++v) origin[v % channels] += y[i][v];
                    const float share = 1.0f / static_cast<float>(group.valid * values_a_channel);
#pragma unroll
                    for (int k = 0; k < channels; ++k) origin[k] *= share;
                }
                count += group.valid * values_a_channel;
#pragma unroll
                for (int i = 0; i < kMomentsUnroll; ++i) {
                    if (i >= group.valid) continue;
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
            });
        double sums[2 * channels] = {};
        if (count > 0)
#pragma unroll
            for (int k = 0; k < channels; ++k) {
                // sum((y - a)) and sum((y - a)^2) from those about b, with step = b - a
                const double step =
                    double{origin[k]} - double{widen(input[first_value(args.shape, channel + k)])};
                sums[k] = sum[k] + count * step;
                sums[channels + k] = squares[k] + step * (2.0 * sum[k] + count * step);
            }
        store_partial_sums<channels, channels_last>(sweep, unit, sums, partials);
    }
}

__global__ void __launch_bounds__(kThreads)
    statistics(BnForward args, const double* partials, int64_t slices) {
    const TwoSums sums = total_sums(partials, slices, args.shape.channels);
    const int64_t channel = int64_t{blockIdx.x} * kFinalChannels + threadIdx.x;
    if (threadIdx.x >= kFinalChannels || channel >= args.shape.channels) return;
    const int64_t rows = args.shape.batch * args.shape.pixels;
    const ChannelVector input{const_cast<void*>(args.input), args.shape.dtype};
    const double origin = rows > 0 ? read(input, first_value(args.shape, channel), 0.0f) : 0.0f;
    const auto batch =
        bn_math::from_shifted_sums<double>(static_cast<double>(rows), origin, sums.first, sums.second);
    if (args.running_mean.data)
        write(args.running_mean, channel,
              static_cast<float>(bn_math::running_update<double>(read(args.running_mean, channel, 0.0f),
                                                                 batch.mean, args.momentum)));
    if (args.running_var.data)
        write(
            args.running_var, channel,
            static_cast<float>(bn_math::running_update<double>(
                read(args.running_var, channel, 1.0f), bn_math::unbiased_variance(batch), args.momentum)));
    static_cast<float*>(args.save_mean)[channel] = static_cast<float>(batch.mean);
    static_cast<float*>(args.save_rstd)[channel] =
        static_cast<float>(bn_math::reciprocal_std(batch.m2 / batch.count, args.eps));
}

template <class T, int width, bool channels_last, bool add_residual>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) apply(Sweep sweep, BnForward args) {
    constexpr int channels = kThreadChannels<width, channels_last>;
    const T* input = static_cast<const T*>(args.input);
    const T* residual = static_cast<const T*>(args.residual);
    T* output = static_cast<T*>(args.output);
    const float floor = args.relu ? 0.0f : kNoFloor;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][channels];  // mean, scale, shift
        tile_coefficients<3, channels, channels_last>(sweep, unit, map, [&](int64_t c, float (&values)[3]) {
            const ForwardMap forward = map_to_apply(args, c, sweep.slice(unit) == 0);
            values[0] = forward.mean;
            values[1] = forward.scale;
            values[2] = forward.shift;
        });
        const int64_t channel = first_channel<channels>(sweep, sweep.tile(unit));
        for_each_group<width, channels_last, kApplyUnroll, Order::backwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<kApplyUnroll>& group) {
                Pack<T, width> y[kApplyUnroll], addend[kApplyUnroll];
#pragma unroll
                for (int i = 0; i < kApplyUnroll; ++i) {
                    if (i >= group.valid) continue;
                    y[i].load(input + group.offset[i]);
                    if constexpr (add_residual) addend[i].load(residual + group.offset[i]);
                }
#pragma unroll
                for (int i = 0; i < kApplyUnroll; ++i) {
                    if (i >= group.valid) continue;
                    Pack<T, width> result;
#pragma unroll
                    for (int v = 0; v < width; ++v) {
                        const int k = v % channels;
                        float z = normalize(y[i][v] - map[0][k], map[1][k], map[2][k]);
                        if constexpr (add_residual) z += addend[i][v];
                        result.set(v, z < floor ? floor : z);
                    }
                    result.store(output + group.offset[i]);
                }
            });
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

template <class Access, bool channels_last>
void take_statistics(const BnForward& args, void* workspace, Stream stream) {
    using T = typename Access::Element;
    constexpr int width = Access::width;
    if (args.statistics != Statistics::batch) return;
    double* partials = static_cast<double*>(workspace);
    const auto kernel = moments<T, width, channels_last>;
    const int64_t resident = resident_blocks(reinterpret_cast<const void*>(kernel));
    const Sweep sweep = sweep_of(args.shape, width, kMomentsUnroll, resident);
    launch(kernel::kMoments, kernel, std::min(sweep.units(), resident), stream, sweep, args, partials);
    launch(kernel::kStatistics, statistics, final_blocks(args.shape.channels), stream, args, partials,
           sweep.slices);
}

template <class Access, bool channels_last>
void run(const BnForward& args, void* workspace, Stream stream) {
    using T = typename Access::Element;
    constexpr int width = Access::width;
    take_statistics<Access, channels_last>(args, workspace, stream);
    const auto kernel =
        args.residual ? apply<T, width, channels_last, true> : apply<T, width, channels_last, false>;
    const int64_t resident = resident_blocks(reinterpret_cast<const void*>(kernel));
    const Sweep sweep = sweep_of(args.shape, width, kApplyUnroll, resident);
    launch(kernel::kApply, kernel, std::min(sweep.units(), resident), stream, sweep, args);
}

}  // namespace

int64_t batch_norm_workspace_bytes(const Activation& shape) {
    // The backward pass's coefficients, mean_grad and slope, follow the partial sums.
    return partial_bytes(shape) + 2 * shape.channels * static_cast<int64_t>(sizeof(float));
}

namespace {

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

}  // namespace

void batch_norm(const BnForward& args, void* workspace, Stream stream) {
    with_input(args, vector_aligned({args.input, args.residual, args.output}),
               [&](auto access, auto channels_last) {
                   run<decltype(access), channels_last.value>(args, workspace, stream);
               });
}

void batch_norm_statistics(const BnForward& args, void* workspace, Stream stream) {
    with_input(args, vector_aligned({args.input}), [&](auto access, auto channels_last) {
        take_statistics<decltype(access), channels_last.value>(args, workspace, stream);
    });
}

}  // namespace fastres::cuda
