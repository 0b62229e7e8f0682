#include "emu/shared_memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastres::emu {
namespace {

constexpr std::size_t kStaticBytes = std::size_t{48} << 10;  // CUDA's limit
constexpr std::size_t kMostArrays = 16;
constexpr std::size_t kZone = 1024;
constexpr std::size_t kAlignment = 16;
constexpr char kUntouched = '\xa5';
constexpr char kNaN = '\xff';  // all bits set are a NaN in each floating-point type

void forbid([[maybe_unused]] const char* at, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(at, bytes);
#endif
}
void allow([[maybe_unused]] const char* at, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(at, bytes);
#endif
}

}  // namespace

SharedMemory::SharedMemory(std::size_t dynamic_bytes)
    : bytes_(dynamic_bytes + kStaticBytes + (kMostArrays + 1) * (kZone + kAlignment)),
      dynamic_bytes_(dynamic_bytes) {}

SharedMemory::~SharedMemory() {
    allow(bytes_.data(), bytes_.size());
}

void SharedMemory::begin() {
    allow(bytes_.data(), bytes_.size());
    std::fill(bytes_.begin(), bytes_.end(), kUntouched);
    forbid(bytes_.data(), bytes_.size());
    arrays_.clear();
    add(nullptr, dynamic_bytes_);
}

char* SharedMemory::array(const void* key, std::size_t bytes) {
    for (const Array& known : arrays_)
        if (known.key == key) return &bytes_[known.offset];
    std::size_t all = bytes;
    for (std::size_t i = 1; i < arrays_.size(); ++i) all += arrays_[i].bytes;
    if (all > kStaticBytes || arrays_.size() == kMostArrays)
        throw std::runtime_error("a block has " + std::to_string(all) + " bytes of shared arrays");
    add(key, bytes);
    return &bytes_[arrays_.back().offset];
}

void SharedMemory::add(const void* key, std::size_t bytes) {
    const std::size_t behind = arrays_.empty() ? 0 : arrays_.back().offset + arrays_.back().bytes;
    const auto address = reinterpret_cast<std::size_t>(bytes_.data()) + behind + kZone;
    const std::size_t offset = behind + kZone + (kAlignment - address % kAlignment) % kAlignment;
    arrays_.push_back({key, offset, bytes});
    allow(&bytes_[offset], bytes);
    std::memset(&bytes_[offset], kNaN, bytes);
}

void SharedMemory::check() const {
#if !defined(__SANITIZE_ADDRESS__)
    std::size_t zone = 0;
    const auto check_to = [&](std::size_t end) {
        const auto touched = std::find_if(bytes_.begin() + static_cast<std::ptrdiff_t>(zone),
                                          bytes_.begin() + static_cast<std::ptrdiff_t>(end),
                                          [](char byte) { return byte != kUntouched; });
        const auto at = static_cast<std::size_t>(touched - bytes_.begin());
        if (at == end) return;
        const Array* before = nullptr;
        for (const Array& array : arrays_)
            if (array.offset + array.bytes <= at) before = &array;
        throw std::runtime_error(
            before == nullptr
                ? "wrote before its dynamic shared memory"
                : "wrote " + std::to_string(at - before->offset - before->bytes) + " bytes past " +
                      (before->key ? "a shared array of " : "its dynamic shared memory of ") +
                      std::to_string(before->bytes) + " bytes");
    };
    for (const Array& array : arrays_) {
        check_to(array.offset);
        zone = array.offset + array.bytes;
    }
    check_to(bytes_.size());
#endif
}

}  // namespace fastres::emu
