// A product of two matrices by cuda/tensor_core.cuh, compared with plain loops: by nvcc for a GPU, by the
// C++ compiler for the emulator. Values are small integers, so that sums in any order are exact.
#include <cstdio>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"
#include "cuda/storage.cuh"
#include "cuda/tensor_core.cuh"

namespace {

using namespace fastres::cuda;

constexpr int kRows = 16 * kWarps, kColumns = 16, kDepth = 48;

// a has kRows rows of kDepth elements. b has kDepth rows of kColumns, or turned, kColumns of kDepth.
template <class T, bool turned>
__global__ void __launch_bounds__(kThreads) product(const T* a, const T* b, float* sums) {
    constexpr int b_row = turned ? kDepth : kColumns;
    T* const own_a = shared_array<struct OfA, T, kRows * kDepth>();
    T* const own_b = shared_array<struct OfB, T, kColumns * kDepth>();
    constexpr int at_once = 16 / sizeof(T);
    for (int i = at_once * threadIdx.x; i < kRows * kDepth; i += at_once * kThreads)
        copy_16_bytes_async(own_a + i, a + i);
    for (int i = at_once * threadIdx.x; i < kColumns * kDepth; i += at_once * kThreads)
        copy_16_bytes_async(own_b + i, b + i);
    close_batch_of_copies();
    wait_for_copies_but(0);
    __syncthreads();
    const int lane = threadIdx.x % 32, first_row = 16 * (threadIdx.x / 32);
    float tile[2][4] = {};
    for (int k = 0; k < kDepth; k += 16) {
        uint32_t of_a[4], of_b[4];
        load_matrices<false>(of_a, own_a + (first_row + lane % 16) * kDepth + k + lane / 16 * 8);
        const int inner = k + lane / 8 % 2 * 8, outer = lane / 16 * 8;
        if constexpr (turned)
            load_matrices<false>(of_b, own_b + (outer + lane % 8) * b_row + inner);
        else
            load_matrices<true>(of_b, own_b + (inner + lane % 8) * b_row + outer);
        multiply_add(tile[0], of_a, {of_b[0], of_b[1]}, T{});
        multiply_add(tile[1], of_a, {of_b[2], of_b[3]}, T{});
    }
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i)
            sums[(first_row + lane / 4 + i / 2 * 8) * kColumns + half * 8 + 2 * (lane % 4) + i % 2] =
                tile[half][i];
}

// Memory that both sides see.
template <class T>
T* allocate(size_t count) {
#if defined(__CUDACC__)
    void* p = nullptr;
    if (cudaMallocManaged(&p, count * sizeof(T)) != cudaSuccess) return nullptr;
    return static_cast<T*>(p);
#else
    return static_cast<T*>(std::aligned_alloc(64, count * sizeof(T)));
#endif
}
void wait_for_device() {
#if defined(__CUDACC__)
    check_launch(cudaDeviceSynchronize(), {"product", nullptr}, 1);
#endif
}

unsigned random_state = 1;
int random_integer() {  // -4 ... 4
    random_state = random_state * 1664525 + 1013904223;
    return static_cast<int>((random_state >> 16) % 9) - 4;
}
template <class T>
T stored(int value) {
    T element;
    narrow(static_cast<float>(value), element);
    return element;
}

template <class T, bool turned>
bool agrees(const char* what) {
    T *a = allocate<T>(kRows * kDepth), *b = allocate<T>(kColumns * kDepth);
    float* sums = allocate<float>(kRows * kColumns);
    if (!a || !b || !sums) return false;
    std::vector<int> x(kRows * kDepth), y(kColumns * kDepth);
    for (size_t i = 0; i < x.size(); ++i) a[i] = stored<T>(x[i] = random_integer());
    for (size_t i = 0; i < y.size(); ++i) b[i] = stored<T>(y[i] = random_integer());
    launch(Kernel{"product", product<T, turned>}, 1, nullptr, a, b, sums);
    wait_for_device();
    for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
            int expected = 0;
            for (int k = 0; k < kDepth; ++k)
                expected += x[row * kDepth + k] * y[turned ? column * kDepth + k : k * kColumns + column];
            if (sums[row * kColumns + column] == static_cast<float>(expected)) continue;
            std::printf("wrong sums: %s, row %d, column %d: %g, expected %d\n", what, row, column,
                        sums[row * kColumns + column], expected);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    try {
        if (!agrees<__nv_bfloat16, false>("bf16") || !agrees<__nv_bfloat16, true>("bf16, turned") ||
            !agrees<__half, false>("f16") || !agrees<__half, true>("f16, turned"))
            return 1;
    } catch (const std::exception& error) {
        std::puts(error.what());
        return 1;
    }
    std::puts("all sums agree");
    return 0;
}
