#include "cuda/batch_norm_backward.cuh"
#include "cuda/max_pool.cuh"
#include "cuda/max_pool.h"

namespace fastres::cuda {
namespace {

// The gradient of what goes into the maximum: that of the windows whose largest pixel it is.
template <class T>
struct PooledGrad {
    static constexpr int unroll = 2;
    static constexpr bool behind_residual = false;

    const T* grad;
    const uint8_t* index;
    MaxPool2d pool;
    int64_t channels;

    template <int width>
    __device__ __forceinline__ void load(int64_t offset, Pack<T, width>& dz) const {
        const Place place = place_of(offset, pool.in, channels);
        const Range rows = windows(place.row, pool.kernel.h, pool.stride.h, pool.padding.h, pool.out.h);
        const Range columns =
            windows(place.column, pool.kernel.w, pool.stride.w, pool.padding.w, pool.out.w);
        float sum[width] = {};
#pragma unroll 1
        for (int row = rows.begin; row < rows.end; ++row) {
            const int tap_row = place.row + static_cast<int>(pool.padding.h - row * pool.stride.h);
#pragma unroll 1
            for (int column = columns.begin; column < columns.end; ++column) {
                const int tap_column =
                    place.column + static_cast<int>(pool.padding.w - column * pool.stride.w);
                const int tap = tap_row * static_cast<int>(pool.kernel.w) + tap_column;
                const int64_t element =
                    ((place.image * pool.out.h + row) * pool.out.w + column) * channels + place.channel;
                Pack<T, width> values;
                values.load(grad + element);
                Taps<width> taps;
                taps.load(index + element);
#pragma unroll
                for (int v = 0; v < width; ++v) sum[v] += taps.value[v] == tap ? values[v] : 0.0f;
            }
        }
#pragma unroll
        for (int v = 0; v < width; ++v) dz.set(v, sum[v]);
    }

  private:
    struct Range {
        int begin, end;
    };

    // Those that see a pixel along one axis.
    static __device__ __forceinline__ Range windows(int pixel, int64_t kernel, int64_t stride,
                                                    int64_t padding, int64_t count) {
        const int padded = pixel + static_cast<int>(padding), step = static_cast<int>(stride);
        const int before = padded - static_cast<int>(kernel);  // what ends here or earlier does not see it
        const int end = padded / step + 1;
        return {before < 0 ? 0 : before / step + 1, end < count ? end : static_cast<int>(count)};
    }
};

}  // namespace

void bn_max_pool_backward(const BnMaxPoolBackward& args, void* workspace, Stream stream) {
    const BnBackward& norm = args.norm;
    check_dtype(norm.weight, "weight");
    check_dtype(norm.bias, "bias");
    const bool vectors =
        fills_vectors(norm.shape) && vector_aligned({args.grad, args.index, norm.input, norm.grad_input});
    with_access(norm.shape.dtype, vectors, [&](auto access) {
        using A = decltype(access);
        using T = typename A::Element;
        if (norm.shape.channels == 0) return;
        const PooledGrad<T> grad{static_cast<const T*>(args.grad), args.index, args.pool,
                                 norm.shape.channels};
        run<A, true>(norm, grad, grad, false, workspace, stream);
    });
}

}  // namespace fastres::cuda
