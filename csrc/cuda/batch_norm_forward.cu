// Batch normalisation forward, with the residual and the activation behind it:
//     moments     input -> two sums a channel and slice
//     statistics  sums -> mean, rstd, running statistics                          (one value a channel)
//     apply       input [, residual] -> output
// In evaluation apply runs alone. A tensor that fits on the chip goes to batch_norm_forward_on_chip.cu.
#include <type_traits>

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_forward.cuh"
#include "cuda/kernel_list.h"
#include "cuda/sweep.cuh"

namespace fastres::cuda {
namespace {

constexpr int kMomentsUnroll = 8;
constexpr int kApplyUnroll = 4;
static_assert(kMomentsUnroll >= kLeastUnroll);

// ---------------------------------------------------------------------------------------------------------
// kernels

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    moments(Sweep sweep, BnForward args, double* partials) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    const T* input = static_cast<const T*>(args.input);
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        const int64_t channel = first_channel<channels>(sweep, sweep.tile(unit));
        Deviations<channels> deviations;
        for_each_group<width, channels_last, kMomentsUnroll, Order::forwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<kMomentsUnroll>& group) {
                Pack<T, width> y[kMomentsUnroll];
#pragma unroll
                for (int i = 0; i < kMomentsUnroll; ++i)
                    if (i < group.valid) y[i].load(input + group.offset[i]);
                deviations.add(y, group.valid);
            });
        double sums[2 * channels];
        deviations.about_first_value(input, args.shape, channel, sums);
        store_partial_sums<channels, kMostLanes<channels_last>>(sweep, unit, sums, partials);
    }
}

__global__ void __launch_bounds__(kThreads)
    statistics(BnForward args, const double* partials, int64_t slices) {
    begin_in_stream_order();
    const int64_t first = int64_t{blockIdx.x} * kFinalChannels;
    const TwoSums sums = total_sums<kFinalChannels>(partials, slices, args.shape.channels, first);
    const int64_t channel = first + threadIdx.x;
    if (threadIdx.x < kFinalChannels && channel < args.shape.channels)
        batch_statistics(args, channel, sums, true);
}

template <class T, int width, bool channels_last, bool add_residual>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) apply(Sweep sweep, BnForward args) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    const T* input = static_cast<const T*>(args.input);
    const T* residual = static_cast<const T*>(args.residual);
    T* output = static_cast<T*>(args.output);
    const float floor = args.relu ? 0.0f : kNoFloor;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][channels];  // mean, scale, shift
        tile_coefficients<3, channels, kMostLanes<channels_last>>(
            sweep, unit, map, [&](int64_t c, float (&values)[3]) {
                map_to_apply(args, c, sweep.slice(unit) == 0).put_first(values);
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
                    normalized<add_residual>(y[i], addend[i], map, floor).store(output + group.offset[i]);
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
    const Sweep sweep = sweep_for(args.shape, width, kMomentsUnroll, resident);
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
    const Sweep sweep = sweep_for(args.shape, width, kApplyUnroll, resident);
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
                   if (batch_norm_on_chip(args, workspace, stream)) return;
                   run<decltype(access), channels_last.value>(args, workspace, stream);
               });
}

void batch_norm_statistics(const BnForward& args, void* workspace, Stream stream) {
    with_input(args, vector_aligned({args.input}), [&](auto access, auto channels_last) {
        take_statistics<decltype(access), channels_last.value>(args, workspace, stream);
    });
}

}  // namespace fastres::cuda
