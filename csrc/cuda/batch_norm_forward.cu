// Batch normalisation forward, with the residual and the activation behind it:
//     apply  input [, residual] -> output
// In training batch_norm_statistics.cu takes the batch's statistics before that. A tensor that fits on the
// chip goes to batch_norm_forward_on_chip.cu.
#include "cuda/batch_norm.h"
#include "cuda/batch_norm_forward.cuh"
#include "cuda/kernel_list.h"
#include "cuda/sweep.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 4;

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
        for_each_group<width, channels_last, kUnroll, Order::backwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<kUnroll>& group) {
                Pack<T, width> y[kUnroll], addend[kUnroll];
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) {
                    if (i >= group.valid) continue;
                    y[i].load(input + group.offset[i]);
                    if constexpr (add_residual) addend[i].load(residual + group.offset[i]);
                }
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) {
                    if (i >= group.valid) continue;
                    normalized<add_residual>(y[i], addend[i], map, floor).store(output + group.offset[i]);
                }
            });
    }
}

template <class Access, bool channels_last>
void run(const BnForward& args, Stream stream) {
    using T = typename Access::Element;
    constexpr int width = Access::width;
    const Kernel kernel{kernel::kApply, args.residual ? apply<T, width, channels_last, true>
                                                      : apply<T, width, channels_last, false>};
    const int64_t resident = resident_blocks(kernel);
    const Sweep sweep = sweep_for(args.shape, width, kUnroll, resident);
    launch(kernel, std::min(sweep.units(), resident), stream, sweep, args);
}

}  // namespace

void batch_norm(const BnForward& args, void* workspace, Stream stream) {
    with_input(args, vector_aligned({args.input, args.residual, args.output}),
               [&](auto access, auto channels_last) {
                   if (batch_norm_on_chip(args, workspace, stream)) return;
                   batch_norm_statistics(args, workspace, stream);
                   run<decltype(access), channels_last.value>(args, stream);
               });
}

}  // namespace fastres::cuda
