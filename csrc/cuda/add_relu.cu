// output = relu(input + other), and grad_input = grad * [output > 0], over dense memory of any layout.
#include <algorithm>

#include "cuda/add_relu.h"
#include "cuda/kernel_list.h"
#include "cuda/launch.h"
#include "cuda/storage.cuh"

namespace fastres::cuda {
namespace {

// Vectors of a thread whose loads are in flight together.
constexpr int kUnroll = 4;

// ---------------------------------------------------------------------------------------------------------
// kernels

// Calls body(Pack, offset) through the tensor; the blocks move side by side. body takes `count` offsets at
// once.
template <class T, int width, class Combine>
__device__ __forceinline__ void combine(int64_t numel, const T* left, const T* right, T* result,
                                        const Combine& value) {
    const int64_t packs = numel / width;
    const int64_t stride = int64_t{gridDim.x} * kThreads;
    for (int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x; first < packs;
         first += kUnroll * stride) {
        Pack<T, width> a[kUnroll], b[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * stride;
            if (pack >= packs) continue;
            a[i].load(left + pack * width);
            b[i].load(right + pack * width);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * stride;
            if (pack >= packs) continue;
            Pack<T, width> both;
#pragma unroll
            for (int v = 0; v < width; ++v) both.set(v, value(a[i][v], b[i][v]));
            both.store(result + pack * width);
        }
    }
    // What fills no vector.
    const int64_t rest = packs * width + threadIdx.x;
    if (blockIdx.x == 0 && rest < numel) {
        Pack<T, 1> a, b, both;
        a.load(left + rest);
        b.load(right + rest);
        both.set(0, value(a[0], b[0]));
        both.store(result + rest);
    }
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads) add_relu_kernel(AddRelu args) {
    begin_in_stream_order();
    combine<T, width>(args.numel, static_cast<const T*>(args.input), static_cast<const T*>(args.other),
                      static_cast<T*>(args.output), [](float a, float b) {
                          const float sum = a + b;
                          return sum < 0.0f ? 0.0f : sum;  // NaN passes, as through PyTorch's ReLU
                      });
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads) add_relu_backward_kernel(AddReluBackward args) {
    begin_in_stream_order();
    combine<T, width>(args.numel, static_cast<const T*>(args.grad), static_cast<const T*>(args.output),
                      static_cast<T*>(args.grad_input),
                      [](float grad, float output) { return output <= 0.0f ? 0.0f : grad; });
}

// ---------------------------------------------------------------------------------------------------------
// launchers

template <class Arguments>
void run(const Kernel<Arguments>& kernel, int width, const Arguments& args, Stream stream) {
    const int64_t block = int64_t{kThreads} * width;
    const int64_t blocks = (args.numel + block - 1) / block;
    launch(kernel, std::min(blocks, resident_blocks(kernel)), stream, args);
}

}  // namespace

void add_relu(const AddRelu& args, Stream stream) {
    with_access(args.dtype, vector_aligned({args.input, args.other, args.output}), [&](auto access) {
        using A = decltype(access);
        if (args.numel > 0)
            run(Kernel{kernel::kAddRelu, add_relu_kernel<typename A::Element, A::width>}, A::width, args,
                stream);
    });
}

void add_relu_backward(const AddReluBackward& args, Stream stream) {
    with_access(args.dtype, vector_aligned({args.grad, args.output, args.grad_input}), [&](auto access) {
        using A = decltype(access);
        if (args.numel > 0)
            run(Kernel{kernel::kAddReluBackward, add_relu_backward_kernel<typename A::Element, A::width>},
                A::width, args, stream);
    });
}

}  // namespace fastres::cuda
