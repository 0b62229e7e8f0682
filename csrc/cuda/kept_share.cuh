// What a block keeps of `tensors` tensors in dynamic shared memory, from one visit of its units to the
// next. Each thread keeps the positions that it visits itself, and finds them again by visiting the same
// groups in the same order: no other thread waits for it, and neighbours' vectors lie side by side in the
// banks.
#pragma once

#include <cstring>

#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"
#include "cuda/storage.cuh"
#include "cuda/sweep.cuh"

namespace fastres::cuda {

template <class T, int width, int tensors, int unroll>
class KeptShare {
    static_assert(width * sizeof(T) == kVectorBytes, "copies are of 16 bytes");

  public:
    // Begins to copy a group's positions in each tensor, behind those that were fetched before.
    __device__ __forceinline__ void fetch(const Group<unroll>& group, const T* const (&from)[tensors]) {
#pragma unroll
        for (int t = 0; t < tensors; ++t)
#pragma unroll
            for (int i = 0; i < unroll; ++i)
                if (i < group.valid) copy_16_bytes_async(at(fetched_, t, i), from[t] + group.offset[i]);
        close_batch_of_copies();
        ++fetched_;
    }

    // Until the copies of the thread's group number `index` are there.
    __device__ __forceinline__ void wait_for(int index) const { wait_for_copies_but(fetched_ - 1 - index); }

    // Position i of the thread's group number `index` in a tensor.
    __device__ __forceinline__ Pack<T, width> get(int index, int tensor, int i) const {
        Pack<T, width> pack;
        pack.load(at(index, tensor, i));
        return pack;
    }
    __device__ __forceinline__ void put(int index, int tensor, int i, const Pack<T, width>& pack) const {
        uint4 raw;
        memcpy(&raw, pack.value, sizeof raw);
        *reinterpret_cast<uint4*>(at(index, tensor, i)) = raw;
    }

  private:
    __device__ __forceinline__ T* at(int index, int tensor, int i) const {
        return first_ + ((index * tensors + tensor) * unroll + i) * kThreads * width;
    }

    T* first_ = static_cast<T*>(dynamic_shared()) + threadIdx.x * width;
    int fetched_ = 0;
};

}  // namespace fastres::cuda
