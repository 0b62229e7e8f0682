// Batch normalisation's gradient in training, with those of the activation and the residual, in one launch
// (g = grad * [z > 0]):
//     grad, input -> shared memory [, output] -> sum(g) and sum(g * (y - mean)) a channel and slice
//                                                [, grad_residual]; g takes grad's place in shared memory
//     a barrier of the grid
//     sums -> grad_weight, grad_bias; shared memory -> grad_input
#include <cooperative_groups.h>

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_gradient.cuh"
#include "cuda/kept_share.cuh"
#include "cuda/kernel_list.h"
#include "cuda/launch.h"
#include "cuda/on_chip.h"

namespace fastres::cuda {
namespace {

// Two tensors are kept: groups of as many bytes as the forward pass has with four.
constexpr int kUnroll = 2;
static_assert(kUnroll >= kLeastUnroll);

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    backward_on_chip(Sweep sweep, BnBackward args, double* partials) {
    begin_in_stream_order();
    constexpr int channels = kThreadChannels<width, channels_last>;
    constexpr int lanes = kOnChipLanes<width, channels_last>;
    constexpr int of_grad = 0, of_input = 1;
    const T* grad = static_cast<const T*>(args.grad);
    const T* input = static_cast<const T*>(args.input);
    const T* output = static_cast<const T*>(args.output);
    T* grad_residual = static_cast<T*>(args.grad_residual);
    T* grad_input = static_cast<T*>(args.grad_input);
    KeptShare<T, width, 2, kUnroll> kept;
    const auto visit = [&](int64_t unit, const auto& body) {
        for_each_group<width, channels_last, kUnroll, Order::forwards>(
            sweep, sweep.slice(unit), first_channel<channels>(sweep, sweep.tile(unit)), body);
    };

    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x)
        visit(unit, [&](const Group<kUnroll>& group) { kept.fetch(group, {grad, input}); });

    int index = 0;
    const bool mask_from_output = args.relu && output;
    const float blocked = mask_from_output ? 0.0f : args.relu ? kStoredAsZero<T> : kBlocksNothing;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][channels];  // mean, scale, shift
        tile_coefficients<3, channels, lanes>(
            sweep, unit, map, [&](int64_t c, float (&values)[3]) { saved_map(args, c).put_first(values); });
        GradientSums<channels> sums;
        visit(unit, [&](const Group<kUnroll>& group) {
            Pack<T, width> z[kUnroll];
            if (mask_from_output)
#pragma unroll
                for (int i = 0; i < kUnroll; ++i)
                    if (i < group.valid) z[i].load(output + group.offset[i]);
            kept.wait_for(index);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                if (i >= group.valid) continue;
                Pack<T, width> dz = kept.get(index, of_grad, i);
                const Pack<T, width> y = kept.get(index, of_input, i);
                mask_from_output ? sums.template mask_and_add<true>(dz, y, z[i], map, blocked)
                                 : sums.template mask_and_add<false>(dz, y, z[i], map, blocked);
                kept.put(index, of_grad, i, dz);
                if (grad_residual) dz.store(grad_residual + group.offset[i]);
            }
            ++index;
        });
        double widened[2 * channels];
        sums.widened(widened);
        store_partial_sums<channels, lanes>(sweep, unit, widened, partials);
    }

    cooperative_groups::this_grid().sync();

    index = 0;
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        const int64_t first = sweep.tile(unit) * sweep.lanes * channels;
        const TwoSums sums = total_sums<lanes * channels>(partials, sweep.slices, sweep.channels, first);
        float map[5][channels];  // mean, scale, shift, mean_grad, slope
        // A tile has no more channels than a block threads: thread i asks for channel first + i, whose sums
        // it has.
        tile_coefficients<5, channels, lanes>(sweep, unit, map, [&](int64_t c, float (&values)[5]) {
            const GradientCoefficients found = gradient_coefficients(args, c, sums, sweep.slice(unit) == 0);
            saved_map(args, c).put_first(values);
            values[3] = found.mean_grad;
            values[4] = found.slope;
        });
        visit(unit, [&](const Group<kUnroll>& group) {
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                if (i >= group.valid) continue;
                const Pack<T, width> g = kept.get(index, of_grad, i), y = kept.get(index, of_input, i);
                Pack<T, width> dy;
#pragma unroll
                for (int v = 0; v < width; ++v) {
                    const int k = v % channels;
                    dy.set(v, input_gradient(g[v], y[v] - map[0][k], map, k));
                }
                dy.store(grad_input + group.offset[i]);
            }
            ++index;
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

template <class T, bool channels_last>
bool run(const BnBackward& args, void* workspace, Stream stream) {
    constexpr int width = kVectorWidth<T>;
    const Kernel kernel{kernel::kBackwardOnChip, backward_on_chip<T, width, channels_last>};
    const auto shape = on_chip(args.shape, width, kUnroll, 2, kernel);
    return shape && launch_together(kernel, shape->blocks, shape->dynamic_bytes, stream, shape->sweep, args,
                                    static_cast<double*>(workspace));
}

}  // namespace

bool batch_norm_backward_on_chip(const BnBackward& args, void* workspace, Stream stream) {
    if (!args.training || !fills_vectors(args.shape) ||
        !vector_aligned({args.grad, args.input, args.output, args.grad_input, args.grad_residual}))
        return false;
    return with_element(args.shape.dtype, [&](auto element) {
        using T = decltype(element);
        return args.shape.channels_last ? run<T, true>(args, workspace, stream)
                                        : run<T, false>(args, workspace, stream);
    });
}

}  // namespace fastres::cuda
