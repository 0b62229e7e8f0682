// A block of CUDA threads on the host: each is a fiber with a stack of its own, and one runs at a time
// until it waits at a barrier. So a launch takes the same course each time, and a barrier that some threads
// never reach is found at once: nobody is left to run. To ThreadSanitizer each fiber is a thread and a
// barrier the only order between them, so that it reports a missing one whatever the course was.
#pragma once

#include <cstddef>
#include <functional>

namespace fastres::emu {

// One-dimensional, as all of our blocks and grids are.
struct Index {
    unsigned x = 1, y = 1, z = 1;
};
// The running thread's.
extern Index threadIdx, blockIdx, blockDim, gridDim;

// Runs body once for each thread of each block. Throws what a thread threw, and std::runtime_error where
// some wait for ever; either with the block and the thread.
void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body);

// Order in which the threads go on: results that depend on it are a race.
void set_schedule(bool descending);

// Called by threads; where they stand is told if they wait for ever.
void sync_threads(const char* file, int line);
void sync_warp(const char* file, int line);
// Writes to `value` the one that lane `from` of the calling thread's warp brings.
void exchange(void* value, std::size_t bytes, int from, const char* file, int line);
// Throws where `address` is no multiple of `alignment`.
void check_alignment(const void* address, std::size_t alignment);

}  // namespace fastres::emu
