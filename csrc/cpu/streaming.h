// Which outputs are written past the caches.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace fastres::cpu {

// A sixteenth of the last-level cache, which others use as well, and at least half of a usual one. What is
// larger would not be there when the next layer reads it, and is written past the caches: it saves the read
// that a plain store begins with.
inline int64_t streaming_bytes() {
    constexpr int64_t least = int64_t{4} << 20, most = int64_t{32} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE) / 16, least, most);
    return bytes;
#else
    return least;
#endif
}

// A streaming store takes whole aligned vectors, so that every row must begin on one.
inline bool streams(const void* output, int64_t bytes, int64_t row_bytes) {
    constexpr int64_t alignment = 64;
    return bytes >= streaming_bytes() && reinterpret_cast<uintptr_t>(output) % alignment == 0 &&
           row_bytes % alignment == 0;
}

}  // namespace fastres::cpu
