// Shared memory of a block.
#pragma once

#include <cuda_runtime.h>

namespace fastres::cuda {

// An array for all threads of the block, aligned to 16 bytes. `Owner` tells it from others of its type and
// size.
template <class Owner, class T, int n>
__device__ __forceinline__ T* shared_array() {
    __shared__ alignas(16) T array[n];
    return array;
}

// As many bytes as the launch gave; aligned to 16.
__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ uint4 dynamic[];
    return dynamic;
}

}  // namespace fastres::cuda
