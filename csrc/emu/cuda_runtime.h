// What csrc/cuda uses of CUDA's runtime and of its builtins, with a meaning on the host. Found in place of
// CUDA's own header by the emulator's build, so that the very sources of the kernels are compiled and run
// without a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emu/block.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using fastres::emu::blockDim;
using fastres::emu::blockIdx;
using fastres::emu::gridDim;
using fastres::emu::threadIdx;

// ---------------------------------------------------------------------------------------------------------
// device

// A load of a vector is the making of one of these from memory, a store is an assignment: the address is
// checked as the hardware would. Nothing here promises the alignment, or the compiler would take it for
// granted.
template <int words>
struct AlignedWords {
    unsigned word[words];

    AlignedWords() = default;
    AlignedWords(const AlignedWords& from) {
        fastres::emu::check_alignment(&from, sizeof *this);
        std::memcpy(word, from.word, sizeof word);
    }
    AlignedWords& operator=(const AlignedWords& from) {
        fastres::emu::check_alignment(this, sizeof *this);
        std::memcpy(word, from.word, sizeof word);
        return *this;
    }
};
using uint2 = AlignedWords<2>;
using uint4 = AlignedWords<4>;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    fastres::emu::sync_threads(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
    fastres::emu::check_whole_warp(mask);
    fastres::emu::sync_warp(file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    fastres::emu::check_whole_warp(mask);
    const int lane = static_cast<int>(threadIdx.x % 32);
    fastres::emu::exchange(&value, sizeof value, lane ^ distance, file, line);
    return value;
}

// ---------------------------------------------------------------------------------------------------------
// host: a small card, so that small tensors have more units than it holds blocks

struct dim3 {
    unsigned x, y, z;

    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorStreamMismatch = 400,  // the emulator's own
    cudaErrorLaunchFailure = 719,
    cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxThreadsPerMultiProcessor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrCooperativeLaunch,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeCooperative,
    cudaLaunchAttributeProgrammaticStreamSerialization
};
enum { cudaSharedmemCarveoutMaxShared = 100 };

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
    int ptxVersion;
};

namespace fastres::emu {
inline constexpr int kMultiprocessors = 2;
inline constexpr int kBlocksPerMultiprocessor = 2;
// A launch on another is an error.
inline cudaStream_t callers_stream = nullptr;
// Runs the grid; what went wrong is told by cudaGetErrorString.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& body);
}  // namespace fastres::emu

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value);

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          std::size_t dynamic_bytes);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    return fastres::emu::launch(reinterpret_cast<const void*>(kernel), *config,
                                [&] { kernel(Parameters(arguments)...); });
}
