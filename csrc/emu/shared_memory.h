// A block's shared memory. What no thread has written is NaN, in any type; around each array lies a zone
// that nobody may touch: AddressSanitizer reports who does, and without it, check() that somebody wrote.
#pragma once

#include <cstddef>
#include <vector>

namespace fastres::emu {

class SharedMemory {
  public:
    explicit SharedMemory(std::size_t dynamic_bytes);
    SharedMemory(SharedMemory&&) = default;
    ~SharedMemory();

    // For a block that starts.
    void begin();
    char* dynamic() { return &bytes_[arrays_[0].offset]; }
    // The one that goes by `key`, which is made at first.
    char* array(const void* key, std::size_t bytes);
    // Throws std::runtime_error where a zone was written.
    void check() const;

  private:
    struct Array {
        const void* key;
        std::size_t offset, bytes;
    };

    void add(const void* key, std::size_t bytes);

    std::vector<char> bytes_;
    std::size_t dynamic_bytes_;
    std::vector<Array> arrays_;  // by offset; the first is the dynamic one
};

}  // namespace fastres::emu
