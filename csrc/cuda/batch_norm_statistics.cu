// Batch normalisation's statistics in training:
//     moments     input -> two sums a channel and slice
//     statistics  sums -> mean, rstd, running statistics                          (one value a channel)
#include "cuda/batch_norm.h"
#include "cuda/batch_norm_forward.cuh"
#include "cuda/kernel_list.h"
#include "cuda/sweep.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 8;
static_assert(kUnroll >= kLeastUnroll);

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    moments(Sweep sweep, BnForward args, double* partials) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    const T* input = static_cast<const T*>(args.input);
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        const int64_t channel = first_channel<channels>(sweep, sweep.tile(unit));
        Deviations<channels> deviations;
        for_each_group<width, channels_last, kUnroll, Order::forwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<kUnroll>& group) {
                Pack<T, width> y[kUnroll];
#pragma unroll
                for (int i = 0; i < kUnroll; ++i)
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

template <class Access, bool channels_last>
void run(const BnForward& args, double* partials, Stream stream) {
    using T = typename Access::Element;
    constexpr int width = Access::width;
    const Kernel kernel{kernel::kMoments, moments<T, width, channels_last>};
    const int64_t resident = resident_blocks(kernel);
    const Sweep sweep = sweep_for(args.shape, width, kUnroll, resident);
    launch(kernel, std::min(sweep.units(), resident), stream, sweep, args, partials);
    launch(Kernel{kernel::kStatistics, statistics}, final_blocks(args.shape.channels), stream, args,
           partials, sweep.slices);
}

}  // namespace

int64_t batch_norm_workspace_bytes(const Activation& shape) {
    // The backward pass's coefficients, mean_grad and slope, follow the partial sums.
    return partial_bytes(shape) + 2 * shape.channels * static_cast<int64_t>(sizeof(float));
}

void batch_norm_statistics(const BnForward& args, void* workspace, Stream stream) {
    if (args.statistics != Statistics::batch) return;
    with_input(args, vector_aligned({args.input}), [&](auto access, auto channels_last) {
        run<decltype(access), channels_last.value>(args, static_cast<double*>(workspace), stream);
    });
}

}  // namespace fastres::cuda
