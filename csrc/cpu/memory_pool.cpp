#include "cpu/memory_pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <iterator>

#include "cpu/huge_pages.h"

namespace fastres::cpu {
namespace {

int64_t rounded(int64_t bytes, int64_t to) {
    return (bytes + to - 1) / to * to;
}

}  // namespace

MemoryPool& MemoryPool::instance() {
    static MemoryPool* const pool = [] {
        // A child of fork, such as a DataLoader's worker, must not inherit a lock that nobody will open.
        pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                       [] { instance().mutex_.unlock(); });
        return new MemoryPool;
    }();
    return *pool;
}

void* MemoryPool::take(int64_t bytes) {
    bytes = rounded(bytes, 64);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto range = free_.begin(); range != free_.end(); ++range)
        if (range->second >= bytes && (best == free_.end() || range->second < best->second)) best = range;
    if (best == free_.end()) best = grow(bytes);
    if (best == free_.end()) return nullptr;
    const auto [begin, size] = *best;
    free_.erase(best);
    if (size > bytes) free_[begin + bytes] = size - bytes;
    in_use_[begin] = bytes;
    bytes_.in_use += bytes;
    bytes_.idle -= bytes;
    return begin;
}

// The free range at the heap's end, made so large.
MemoryPool::Ranges::iterator MemoryPool::grow(int64_t bytes) {
    if (!end_) {
        const int64_t reserved = 2 * sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
        void* const addresses =
            mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (addresses == MAP_FAILED) return free_.end();
        limit_ = static_cast<char*>(addresses) + reserved;
        end_ = static_cast<char*>(addresses);
        end_ += rounded(reinterpret_cast<intptr_t>(end_), huge_page) - reinterpret_cast<intptr_t>(end_);
    }
    if (!free_.empty()) {
        const auto last = std::prev(free_.end());
        if (last->first + last->second == end_) bytes -= last->second;
    }
    bytes = rounded(bytes, huge_page);
    if (bytes > limit_ - end_ || mprotect(end_, bytes, PROT_READ | PROT_WRITE) != 0) return free_.end();
    advise_huge_pages(end_, bytes);
    bytes_.idle += bytes;
    end_ += bytes;
    return add_free(end_ - bytes, bytes);
}

MemoryPool::Ranges::iterator MemoryPool::add_free(char* begin, int64_t bytes) {
    auto next = free_.lower_bound(begin);
    if (next != free_.end() && begin + bytes == next->first) {
        bytes += next->second;
        next = free_.erase(next);
    }
    if (next != free_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == begin) {
            before->second += bytes;
            return before;
        }
    }
    return free_.emplace(begin, bytes).first;
}

void MemoryPool::give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(block);
    const int64_t bytes = found->second;
    in_use_.erase(found);
    add_free(static_cast<char*>(block), bytes);
    bytes_.in_use -= bytes;
    bytes_.idle += bytes;
}

void MemoryPool::release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (const auto& [begin, bytes] : free_) {
        const int64_t first = rounded(reinterpret_cast<intptr_t>(begin), page);
        const int64_t end = (reinterpret_cast<intptr_t>(begin) + bytes) / page * page;
        if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
    }
    if (free_.empty()) return;
    const auto last = std::prev(free_.end());
    if (last->first + last->second != end_) return;
    // The heap ends on a boundary of pages, so that what is left of it begins on one when it grows again.
    const int64_t bytes = last->second / huge_page * huge_page;
    end_ -= bytes;
    bytes_.idle -= bytes;
    if ((last->second -= bytes) == 0) free_.erase(last);
}

MemoryPool::Bytes MemoryPool::bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
}

}  // namespace fastres::cpu
