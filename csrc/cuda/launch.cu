#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears it
    throw std::runtime_error("fastres: " + std::string(what) + " failed: " + cudaGetErrorString(status));
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

}  // namespace

int64_t resident_blocks(const void* kernel) {
    return remembered(kernel, [&](int device) {
        int per_multiprocessor = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        return int64_t{per_multiprocessor} * attribute(cudaDevAttrMultiProcessorCount, device);
    });
}

int64_t most_resident_blocks() {
    return remembered(nullptr, [](int device) {
        return int64_t{attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device) / kThreads} *
               attribute(cudaDevAttrMultiProcessorCount, device);
    });
}

void check_launch(cudaError_t status, const char* name, int64_t blocks) {
    const cudaError_t pending = cudaGetLastError();
    if (status == cudaSuccess) status = pending;
    if (status == cudaSuccess) return;
    throw std::runtime_error("fastres: kernel " + std::string(name) + " failed to launch with grid " +
                             std::to_string(blocks) + ", block " + std::to_string(kThreads) +
                             ", dynamic shared memory 0: " + cudaGetErrorString(status));
}

}  // namespace fastres::cuda
