// Batch normalisation forward in training, with the residual and the activation behind it, in one launch:
//     input -> shared memory -> two sums a channel and slice
//     a barrier of the grid
//     sums -> mean, rstd, running statistics; shared memory [, residual] -> output
#include <cooperative_groups.h>

#include <type_traits>

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_forward.cuh"
#include "cuda/kept_share.cuh"
#include "cuda/kernel_list.h"
#include "cuda/launch.h"
#include "cuda/on_chip.h"

namespace fastres::cuda {
namespace {

// A finer one cuts the tensor into more even shares; the residual's loads are in flight together.
constexpr int kUnroll = 4;
static_assert(kUnroll >= kLeastUnroll);

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    forward_on_chip(Sweep sweep, BnForward args, double* partials) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int lanes = kOnChipLanes<width, channels_last>;
    const T* input = static_cast<const T*>(args.input);
    const T* residual = static_cast<const T*>(args.residual);
    T* output = static_cast<T*>(args.output);
    KeptShare<T, width, 1, kUnroll> kept;
    const auto visit = [&](int64_t unit, const auto& body) {
        for_each_group<width, channels_last, kUnroll, Order::forwards>(
            sweep, sweep.slice(unit), first_channel<channels>(sweep, sweep.tile(unit)), body);
    };

    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x)
        visit(unit, [&](const Group<kUnroll>& group) { kept.fetch(group, {input}); });

    int index = 0;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        Deviations<channels> deviations;
        visit(unit, [&](const Group<kUnroll>& group) {
            kept.wait_for(index);
            Pack<T, width> y[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i)
                if (i < group.valid) y[i] = kept.get(index, 0, i);
            deviations.add(y, group.valid);
            ++index;
        });
        double sums[2 * channels];
        deviations.about_first_value(input, args.shape, first_channel<channels>(sweep, sweep.tile(unit)),
                                     sums);
        store_partial_sums<channels, lanes>(sweep, unit, sums, partials);
    }

    cooperative_groups::this_grid().sync();

    index = 0;
    const float floor = args.relu ? 0.0f : kNoFloor;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        const int64_t first = sweep.tile(unit) * sweep.lanes * channels;
        const TwoSums sums = total_sums<lanes * channels>(partials, sweep.slices, sweep.channels, first);
        float map[3][channels];  // mean, scale, shift
        // A tile has no more channels than a block threads: thread i asks for channel first + i, whose sums
        // it has.
        tile_coefficients<3, channels, lanes>(sweep, unit, map, [&](int64_t c, float (&values)[3]) {
            const BatchStatistics batch = batch_statistics(args, c, sums, sweep.slice(unit) == 0);
            forward_map(args.weight, args.bias, c, batch.mean, batch.rstd).put_first(values);
        });
        visit(unit, [&](const Group<kUnroll>& group) {
            Pack<T, width> addend[kUnroll];
            if (residual)
#pragma unroll
                for (int i = 0; i < kUnroll; ++i)
                    if (i < group.valid) addend[i].load(residual + group.offset[i]);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                if (i >= group.valid) continue;
                const Pack<T, width> y = kept.get(index, 0, i);
                const Pack<T, width> z = residual ? normalized<true>(y, addend[i], map, floor)
                                                  : normalized<false>(y, addend[i], map, floor);
                z.store(output + group.offset[i]);
            }
            ++index;
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

template <class T, bool channels_last>
bool run(const BnForward& args, void* workspace, Stream stream) {
    constexpr int width = kVectorWidth<T>;
    const Kernel kernel{kernel::kForwardOnChip, forward_on_chip<T, width, channels_last>};
    const auto shape = on_chip(args.shape, width, kUnroll, 1, kernel);
    return shape && launch_together(kernel, shape->blocks, shape->dynamic_bytes, stream, shape->sweep, args,
                                    static_cast<double*>(workspace));
}

}  // namespace

bool batch_norm_on_chip(const BnForward& args, void* workspace, Stream stream) {
    if (args.statistics != Statistics::batch || !fills_vectors(args.shape) ||
        !vector_aligned({args.input, args.residual, args.output}))
        return false;
    return with_element(args.shape.dtype, [&](auto element) {
        using T = decltype(element);
        return args.shape.channels_last ? run<T, true>(args, workspace, stream)
                                        : run<T, false>(args, workspace, stream);
    });
}

}  // namespace fastres::cuda
