// Large fresh outputs on 2 MiB pages.
//
// glibc takes blocks of more than 32 MiB from the kernel each time anew, unless a free one is at hand. The
// kernel zeroes them at the first touch, page by page: with 4 KiB pages that costs several times what the
// fused kernels themselves do with the memory. Where the system offers transparent huge pages on request
// ("madvise", the usual setting), asking for them is one system call. Smaller blocks come from memory that
// the process has already touched; advice about that costs more than it gains.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastres::cpu {

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t least = int64_t{32} << 20;  // DEFAULT_MMAP_THRESHOLD_MAX
    if (bytes <= least) return;
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
    // A refusal costs nothing but the speed, so the result is not looked at.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastres::cpu
