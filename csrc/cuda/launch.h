// Launches with their error check, and the grids that fill the current device once.
#pragma once

#include <cuda_runtime.h>

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

// Blocks of `kernel` that the current device holds at a time.
int64_t resident_blocks(const void* kernel);
// The same for a kernel that nothing but its threads limits: no kernel has more.
int64_t most_resident_blocks();

// Throws std::runtime_error that names the kernel and its launch shape.
void check_launch(cudaError_t status, const char* name, int64_t blocks);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, Stream stream,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    check_launch(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name, blocks);
}

}  // namespace fastres::cuda
