// Large memory on 2 MiB pages.
//
// The kernel zeroes fresh memory at the first touch, page by page: with 4 KiB pages that costs several
// times what the fused kernels themselves do with the memory. Where the system offers transparent huge
// pages on request ("madvise", the usual setting), asking for them is one system call.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastres::cpu {

constexpr int64_t huge_page = int64_t{2} << 20;

// Where the block holds none of them as a whole, this does nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = huge_page;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin >= end) return;
    // A refusal costs nothing but the speed, so the result is not looked at.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastres::cpu
