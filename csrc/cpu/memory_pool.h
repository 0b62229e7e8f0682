// Memory of large tensors, kept from one training step to the next.
//
// malloc hands large blocks back to the kernel when they are freed, so every step takes its activations and
// gradients anew, and the kernel zeroes each page at its first touch: of a ResNet-50 step in fp32, a tenth.
// The pool is one heap that grows and whose pages stay. A block is the smallest free range that is large
// enough; a freed one is joined with its free neighbours. So what is held is the most that was ever in use,
// and a little for gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace fastres::cpu {

class MemoryPool {
  public:
    // Smaller ones are malloc's: it keeps them itself.
    static constexpr int64_t least = int64_t{1} << 20;

    struct Bytes {
        int64_t in_use, idle;
    };

    // A block of at least so many bytes on the boundary of a cache line; null where there is no memory
    // left.
    void* take(int64_t bytes);
    // Takes a block back. Any thread may call it, and at any time until the process ends.
    void give_back(void* block);
    // Gives the pages of all that is idle back to the kernel, and ends the heap behind its last block.
    void release();
    Bytes bytes();

    // Of the process. It is never destroyed: tensors may outlive all else.
    static MemoryPool& instance();

  private:
    using Ranges = std::map<char*, int64_t>;  // bytes by where they begin

    Ranges::iterator grow(int64_t bytes);
    Ranges::iterator add_free(char* begin, int64_t bytes);

    std::mutex mutex_;
    char* end_ = nullptr;    // of the heap
    char* limit_ = nullptr;  // of the addresses that are reserved for it
    Ranges free_;
    std::unordered_map<void*, int64_t> in_use_;
    Bytes bytes_{0, 0};
};

}  // namespace fastres::cpu
