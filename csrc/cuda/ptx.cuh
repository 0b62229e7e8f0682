// Inline PTX, under names that say what the hardware does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

// The first statement of every kernel. A launch may be let begin before the one ahead of it on the stream
// has ended (overlap_launches() in stream.h): from here on the one behind may begin, and beyond this all
// ahead have ended, and what they wrote is there.
__device__ __forceinline__ void begin_in_stream_order() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// One store to memory, at a multiple of 16. An assignment is not always one: in the contiguous layout the
// compiler cut most of them into four of 4 bytes.
__device__ __forceinline__ void store_16_bytes(void* global, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// A copy from memory to shared memory that passes no register and no L1; both addresses are multiples
// of 16. L2 fetches whole lines of 128 bytes, of which a warp may ask for a half.
__device__ __forceinline__ void copy_16_bytes_async(void* shared, const void* global) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
                 : "memory");
}

// What the calling thread began to copy since the last batch is a batch.
__device__ __forceinline__ void close_batch_of_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int newest>
__device__ __forceinline__ void wait_for_all_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}
// Until the calling thread's batches have arrived, all but the `newest`, or but 8 of them. What arrived is
// there for this thread alone.
__device__ __forceinline__ void wait_for_copies_but(int newest) {
    switch (newest) {
        case 0:
            return wait_for_all_copies_but<0>();
        case 1:
            return wait_for_all_copies_but<1>();
        case 2:
            return wait_for_all_copies_but<2>();
        case 3:
            return wait_for_all_copies_but<3>();
        case 4:
            return wait_for_all_copies_but<4>();
        case 5:
            return wait_for_all_copies_but<5>();
        case 6:
            return wait_for_all_copies_but<6>();
        case 7:
            return wait_for_all_copies_but<7>();
        default:
            return wait_for_all_copies_but<8>();
    }
}

}  // namespace fastres::cuda
