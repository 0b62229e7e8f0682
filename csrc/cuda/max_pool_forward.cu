// Batch norm, ReLU and the maximum over windows:
//     moments, statistics  of batch_norm_statistics.cu
//     apply_max_pool       input -> output and index
#include <algorithm>

#include "cuda/batch_norm.h"
#include "cuda/kernel_list.h"
#include "cuda/max_pool.cuh"
#include "cuda/max_pool.h"
#include "cuda/storage.cuh"
#include "cuda/sweep.cuh"
#include "cuda/tile_coefficients.cuh"

namespace fastres::cuda {
namespace {

// Visits the output. `side` is that of a square kernel, whose loads are then all in flight together; 0:
// any.
template <class T, int width, int side>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    apply_max_pool(Sweep sweep, BnMaxPoolForward args) {
    begin_in_stream_order();
    const MaxPool2d& pool = args.pool;
    const T* input = static_cast<const T*>(args.norm.input);
    T* output = static_cast<T*>(args.output);
    const int kernel_h = side > 0 ? side : static_cast<int>(pool.kernel.h);
    const int kernel_w = side > 0 ? side : static_cast<int>(pool.kernel.w);
    for (int64_t unit = blockIdx.x; unit < sweep.units(); unit += gridDim.x) {
        float map[3][width];  // mean, scale, shift
        tile_coefficients<3, width, kMostLanes<true>>(sweep, unit, map, [&](int64_t c, float (&values)[3]) {
            map_to_apply(args.norm, c, sweep.slice(unit) == 0).put_first(values);
        });
        const int64_t channel = first_channel<width>(sweep, sweep.tile(unit));
        for_each_group<width, true, 1, Order::backwards>(
            sweep, sweep.slice(unit), channel, [&](const Group<1>& group) {
                const Place place = place_of(group.offset[0], pool.out, sweep.channels);
                const int first_row =
                    place.row * static_cast<int>(pool.stride.h) - static_cast<int>(pool.padding.h);
                const int first_column =
                    place.column * static_cast<int>(pool.stride.w) - static_cast<int>(pool.padding.w);
                float largest[width];
                Taps<width> taps;
                bool none = true;
                const auto take = [&](const Pack<T, width>& y, int tap) {
#pragma unroll
                    for (int v = 0; v < width; ++v) {
                        // As it would be stored, so that equal ones are equal; NaN passes the ReLU, and
                        // stays, as in PyTorch.
                        const float z = normalize(y[v] - map[0][v], map[1][v], map[2][v]);
                        Pack<T, 1> stored;
                        stored.set(0, z < 0.0f ? 0.0f : z);
                        const float value = stored[0];
                        if (none || value > largest[v] || value != value) {
                            largest[v] = value;
                            taps.value[v] = static_cast<uint8_t>(tap);
                        }
                    }
                    none = false;
                };
                const auto inside = [&](int i, int j) {
                    return first_row + i >= 0 && first_row + i < pool.in.h && first_column + j >= 0 &&
                           first_column + j < pool.in.w;
                };
                const auto pixel = [&](int i, int j) {
                    return input +
                           ((place.image * pool.in.h + first_row + i) * pool.in.w + first_column + j) *
                               sweep.channels +
                           place.channel;
                };
                if constexpr (side > 0) {
                    Pack<T, width> y[side * side];
#pragma unroll
                    for (int tap = 0; tap < side * side; ++tap)
                        if (inside(tap / side, tap % side)) y[tap].load(pixel(tap / side, tap % side));
#pragma unroll
                    for (int tap = 0; tap < side * side; ++tap)
                        if (inside(tap / side, tap % side)) take(y[tap], tap);
                } else {
                    for (int i = 0; i < kernel_h; ++i) {
                        for (int j = 0; j < kernel_w; ++j) {
                            if (!inside(i, j)) continue;
                            Pack<T, width> y;
                            y.load(pixel(i, j));
                            take(y, i * kernel_w + j);
                        }
                    }
                }
                Pack<T, width> result;
#pragma unroll
                for (int v = 0; v < width; ++v) result.set(v, largest[v]);
                result.store(output + group.offset[0]);
                taps.store(args.index + group.offset[0]);
            });
    }
}

}  // namespace

void bn_max_pool(const BnMaxPoolForward& args, void* workspace, Stream stream) {
    batch_norm_statistics(args.norm, workspace, stream);
    const bool vectors =
        fills_vectors(args.norm.shape) && vector_aligned({args.norm.input, args.output, args.index});
    with_access(args.norm.shape.dtype, vectors, [&](auto access) {
        using T = typename decltype(access)::Element;
        constexpr int width = decltype(access)::width;
        const MaxPool2d& pool = args.pool;
        if (args.norm.shape.channels == 0 || pool.batch == 0) return;
        Activation shape = args.norm.shape;
        shape.pixels = pool.out.h * pool.out.w;
        const bool of_three = pool.kernel.h == 3 && pool.kernel.w == 3;
        const Kernel kernel{kernel::kApplyMaxPool,
                            of_three ? apply_max_pool<T, width, 3> : apply_max_pool<T, width, 0>};
        const int64_t resident = resident_blocks(kernel);
        const Sweep sweep = sweep_for(shape, width, 1, resident);
        launch(kernel, std::min(sweep.units(), resident), stream, sweep, args);
    });
}

}  // namespace fastres::cuda
