// Which outputs are written past the caches.
#pragma once

#include <cstdint>

namespace fastres::cpu {

// Half of a usual last-level cache. What is larger would not be there when the next layer reads it, and is
// written past the caches: it saves the read that a plain store begins with.
inline constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// A streaming store takes whole aligned vectors, so that every row must begin on one.
inline bool streams(const void* output, int64_t bytes, int64_t row_bytes) {
    constexpr int64_t alignment = 64;
    return bytes >= kStreamingBytes && reinterpret_cast<uintptr_t>(output) % alignment == 0 &&
           row_bytes % alignment == 0;
}

}  // namespace fastres::cpu
