// The host's side of CUDA for cards of two multiprocessors, each with the shared memory of an H100's.
#include <algorithm>
#include <exception>
#include <map>
#include <string>
#include <utility>

#include "cuda_runtime.h"

namespace {

constexpr int kSharedBytes = 228 << 10;
constexpr int kReservedBytes = 1 << 10;         // of each block
constexpr int kUnaskedDynamicBytes = 48 << 10;  // what a block may have with no attribute set
constexpr unsigned kMostThreads = 1024;         // of a block
constexpr std::size_t kStaticBytes = 16 << 10;  // what each kernel is taken to have itself

std::string message = "no error";
std::map<std::pair<int, const void*>, int> most_dynamic_bytes;  // by device and kernel
int cooperative_launches = 0, overlapping_launches = 0;
int current_device = 0;
int ptx_version = 90;  // of all kernels
cudaError_t pending = cudaSuccess;
int held_blocks = fastres::emu::kMultiprocessors * fastres::emu::kBlocksPerMultiprocessor;

cudaError_t failed(cudaError_t status, const std::string& why) {
    message = why;
    return status;
}

cudaError_t found_kernel() {
    return ptx_version > 0 ? cudaSuccess
                           : failed(cudaErrorNoKernelImageForDevice, "no kernel image for this device");
}

}  // namespace

namespace fastres::emu {

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& body) {
    Shape shape{config.gridDim.x, config.blockDim.x, config.dynamicSmemBytes, false, false};
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config.attrs[i];
        if (attribute.id == cudaLaunchAttributeCooperative)
            shape.cooperative = attribute.val.cooperative != 0;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            shape.may_overlap = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
    overlapping_launches += shape.may_overlap;
    if (config.stream != callers_stream)
        return failed(cudaErrorStreamMismatch, "not on the caller's stream");
    if (shape.blocks == 0) return failed(cudaErrorInvalidConfiguration, "a grid of no blocks");
    if (config.blockDim.x > kMostThreads)
        return failed(cudaErrorInvalidConfiguration, "too many threads in a block");
    const auto asked = most_dynamic_bytes.find({current_device, kernel});
    const int most = asked == most_dynamic_bytes.end() ? kUnaskedDynamicBytes : asked->second;
    if (shape.dynamic_bytes > static_cast<std::size_t>(most))
        return failed(cudaErrorInvalidValue, "more dynamic shared memory than the kernel asked for");
    if (shape.cooperative) {
        const std::size_t a_block = shape.dynamic_bytes + kStaticBytes + kReservedBytes;
        const auto by_memory = static_cast<int>(kSharedBytes / a_block);
        const int resident = kMultiprocessors * std::min(by_memory, kBlocksPerMultiprocessor);
        if (shape.blocks > static_cast<unsigned>(std::min(resident, held_blocks)))
            return failed(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch");
        ++cooperative_launches;
    }
    try {
        run_grid(shape, body);
        return cudaSuccess;
    } catch (const std::exception& error) {
        return failed(cudaErrorLaunchFailure, error.what());
    }
}

}  // namespace fastres::emu

const char* cudaGetErrorString(cudaError_t) {
    return message.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            break;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = 1024;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = fastres::emu::kMultiprocessors;
            break;
        case cudaDevAttrCooperativeLaunch:
            *value = held_blocks > 0;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = kSharedBytes - kReservedBytes;
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = kSharedBytes;
            break;
        case cudaDevAttrReservedSharedMemoryPerBlock:
            *value = kReservedBytes;
            break;
    }
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t status = pending;
    pending = cudaSuccess;
    return status;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t) {
    *blocks = fastres::emu::kBlocksPerMultiprocessor;
    return found_kernel();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {kStaticBytes, ptx_version};
    return found_kernel();
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value + static_cast<int>(kStaticBytes) > kSharedBytes - kReservedBytes)
        return failed(cudaErrorInvalidValue, "more shared memory than a block may have");
    most_dynamic_bytes[{current_device, kernel}] = value;
    return cudaSuccess;
}

extern "C" {

int fastres_emu_cooperative_launches() {
    return cooperative_launches;
}
int fastres_emu_overlapping_launches() {
    return overlapping_launches;
}
// From now on the current device is another one, for which the kernels were compiled as PTX of that
// version, of 80 for compute capability 8.0; 0: not at all.
void fastres_emu_set_device(int device, int version) {
    current_device = device;
    ptx_version = version;
}
// As where what ran before has failed.
void fastres_emu_leave_error(const char* why) {
    pending = failed(cudaErrorLaunchFailure, why);
}
// As where others use a part of the card.
void fastres_emu_hold_blocks(int blocks) {
    held_blocks = blocks;
}

}  // extern "C"
