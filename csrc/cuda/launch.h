// Launches with their error check, and the grids that fill the current device once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/stream.h"

namespace fastres::cuda {

// Threads of every block in this folder.
inline constexpr int kThreads = 256;
inline constexpr int kWarpThreads = 32;
inline constexpr int kWarps = kThreads / kWarpThreads;
// Blocks of the larger kernels that a multiprocessor must hold at least: a bound of 128 registers a thread.
// 16 bytes for each of 512 threads times the loads that each has in flight cover the latency of memory.
inline constexpr int kLeastBlocks = 2;

// A kernel, and the name under which what goes wrong with it is told.
struct AnyKernel {
    const char* name;
    const void* function;
};
template <class... Parameters>
struct Kernel {
    const char* name;
    void (*function)(Parameters...);

    operator AnyKernel() const { return {name, reinterpret_cast<const void*>(function)}; }
};
template <class... Parameters>
Kernel(const char*, void (*)(Parameters...)) -> Kernel<Parameters...>;

// Blocks of `kernel` that the current device holds at a time.
int64_t resident_blocks(const AnyKernel& kernel);
// The same for a kernel that nothing but its threads limits: no kernel has more.
int64_t most_resident_blocks();

// For a launch of which `a_multiprocessor` blocks lie on each multiprocessor: the blocks in all, and the
// bytes of dynamic shared memory of each, which `kernel` may ask for from then on. None where the device
// has no cooperative launch.
struct Room {
    int64_t blocks, dynamic_bytes;
};
Room room_of(const AnyKernel& kernel, int a_multiprocessor);

// Throws std::runtime_error that names the kernel and its launch shape.
void check_launch(cudaError_t status, const AnyKernel& kernel, int64_t blocks, int64_t dynamic_bytes = 0);

// Whether overlap_launches() was asked for, and what runs on the current device waits for launches ahead.
bool launches_overlap(const AnyKernel& kernel);

inline cudaLaunchConfig_t launch_config(int64_t blocks, Stream stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    return config;
}

template <class... Parameters, class... Arguments>
void launch(const Kernel<Parameters...>& kernel, int64_t blocks, Stream stream,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config = launch_config(blocks, stream);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = launches_overlap(kernel) ? 1 : 0;
    check_launch(cudaLaunchKernelEx(&config, kernel.function, Parameters(arguments)...), kernel, blocks);
}

// A launch whose blocks run all at a time, so that they can wait for each other. False, and nothing is
// launched, where the device holds fewer at present than it has multiprocessors for, as on a part of it.
template <class... Parameters, class... Arguments>
bool launch_together(const Kernel<Parameters...>& kernel, int64_t blocks, int64_t dynamic_bytes,
                     Stream stream, const Arguments&... arguments) {
    cudaLaunchConfig_t config = launch_config(blocks, stream);
    config.dynamicSmemBytes = static_cast<std::size_t>(dynamic_bytes);
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel.function, Parameters(arguments)...);
    if (status == cudaErrorCooperativeLaunchTooLarge) {
        cudaGetLastError();  // clears it
        return false;
    }
    check_launch(status, kernel, blocks, dynamic_bytes);
    return true;
}

}  // namespace fastres::cuda
