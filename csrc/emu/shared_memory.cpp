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
    : bytes_(dynamic_bytes + kStaticBytes + (kMostArrays + 1) * (2 * kZone + kAlignment)),
      dynamic_bytes_(dynamic_bytes) {}

SharedMemory::~SharedMemory() {
    allow(bytes_.data(), bytes_.size());
}

void SharedMemory::begin() {
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
    const std::size_t behind = arrays_.empty() ? 0 : arrays_.back().offset + arrays_.back().bytes + kZone;
    const auto address = reinterpret_cast<std::size_t>(bytes_.data()) + behind + kZone;
    const std::size_t offset = behind + kZone + (kAlignment - address % kAlignment) % kAlignment;
    arrays_.push_back({key, offset, bytes});
    allow(&bytes_[offset - kZone], bytes + 2 * kZone);
    std::memset(&bytes_[offset - kZone], kUntouched, kZone);
    std::memset(&bytes_[offset], kNaN, bytes);
    std::memset(&bytes_[offset + bytes], kUntouched, kZone);
    forbid(&bytes_[offset - kZone], kZone);
    forbid(&bytes_[offset + bytes], kZone);
}

void SharedMemory::check() const {
#if !defined(__SANITIZE_ADDRESS__)
    static const std::vector<char> untouched(kZone, kUntouched);
    const auto distance = [&](std::size_t zone) {
        return static_cast<std::size_t>(
            std::mismatch(untouched.begin(), untouched.end(), &bytes_[zone]).first - untouched.begin());
    };
    for (const Array& array : arrays_) {
        const std::string what = (array.key ? "a shared array of " : "its dynamic shared memory of ") +
                                 std::to_string(array.bytes) + " bytes";
        const std::size_t behind = array.offset + array.bytes;
        if (std::memcmp(&bytes_[behind], untouched.data(), kZone) != 0)
            throw std::runtime_error("wrote " + std::to_string(distance(behind)) + " bytes past " + what);
        if (std::memcmp(&bytes_[array.offset - kZone], untouched.data(), kZone) != 0)
            throw std::runtime_error("wrote before " + what);
    }
#endif
}

}  // namespace fastres::emu
