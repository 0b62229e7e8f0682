#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears it
    throw std::runtime_error("fastres: " + what + " failed: " + cudaGetErrorString(status));
}
void check(cudaError_t status, const char* what, const AnyKernel& kernel) {
    if (status != cudaSuccess) check(status, std::string(what) + " of kernel " + kernel.name);
}

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

// Values that cost a driver call to find and never change, one for each (device, kernel).
template <class Find>
int64_t remembered(const void* kernel, const Find& find) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, int64_t> values;
    const int device = current_device();
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [entry, missing] = values.try_emplace({device, kernel}, 0);
    if (missing) {
        try {
            entry->second = find(device);
        } catch (...) {
            values.erase(entry);
            throw;
        }
    }
    return entry->second;
}

std::atomic<bool> overlapping{false};

}  // namespace

void overlap_launches(bool overlap) {
    overlapping = overlap;
}

bool launches_overlap(const AnyKernel& kernel) {
    if (!overlapping) return false;
    // A card that can may run code that was compiled for one that cannot, and does not wait.
    return remembered(kernel.function, [&](int device) {
               constexpr int first_major = 9;
               cudaFuncAttributes attributes{};
               check(cudaFuncGetAttributes(&attributes, kernel.function), "cudaFuncGetAttributes", kernel);
               return int64_t{attribute(cudaDevAttrComputeCapabilityMajor, device) >= first_major &&
                              attributes.ptxVersion >= 10 * first_major};
           }) != 0;
}

int64_t resident_blocks(const AnyKernel& kernel) {
    return remembered(kernel.function, [&](int device) {
        int per_multiprocessor = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel.function, kThreads,
                                                            0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor", kernel);
        return int64_t{per_multiprocessor} * attribute(cudaDevAttrMultiProcessorCount, device);
    });
}

int64_t most_resident_blocks() {
    return remembered(nullptr, [](int device) {
        return int64_t{attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device) / kThreads} *
               attribute(cudaDevAttrMultiProcessorCount, device);
    });
}

Room room_of(const AnyKernel& kernel, int a_multiprocessor) {
    const int64_t own_bytes = remembered(kernel.function, [&](int device) {
        cudaFuncAttributes attributes{};
        check(cudaFuncGetAttributes(&attributes, kernel.function), "cudaFuncGetAttributes", kernel);
        const auto bytes = static_cast<int>(attributes.sharedSizeBytes);
        const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - bytes;
        check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
              "cudaFuncSetAttribute", kernel);
        check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared),
              "cudaFuncSetAttribute", kernel);
        return int64_t{bytes};
    });
    const int device = current_device();
    if (attribute(cudaDevAttrCooperativeLaunch, device) == 0) return {0, 0};
    const int64_t share =
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / a_multiprocessor -
        attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    const int64_t a_block =
        std::min<int64_t>(share, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return {int64_t{attribute(cudaDevAttrMultiProcessorCount, device)} * a_multiprocessor,
            a_block - own_bytes};
}

void check_launch(cudaError_t status, const AnyKernel& kernel, int64_t blocks, int64_t dynamic_bytes) {
    const cudaError_t pending = cudaGetLastError();
    if (status == cudaSuccess) status = pending;
    if (status == cudaSuccess) return;
    throw std::runtime_error("fastres: kernel " + std::string(kernel.name) +
                             " failed to launch with grid " + std::to_string(blocks) + ", block " +
                             std::to_string(kThreads) + ", dynamic shared memory " +
                             std::to_string(dynamic_bytes) + ": " + cudaGetErrorString(status));
}

}  // namespace fastres::cuda
