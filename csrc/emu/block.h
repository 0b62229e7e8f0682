// Blocks of CUDA threads on the host: each thread is a fiber with a stack of its own, and one runs at a
// time until it waits at a barrier. Blocks run one after the other, those of a cooperative launch side by
// side. So a launch takes the same course each time, and a barrier that some threads never reach is found
// at once: nobody is left to run. To ThreadSanitizer each fiber is a thread and a barrier the only order
// between them, so that it reports a missing one whatever the course was.
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

struct Shape {
    unsigned blocks, threads;
    std::size_t dynamic_bytes;  // of shared memory a block
    bool cooperative;
    bool may_overlap;  // launches ahead
};

// Runs body once for each thread of each block. Throws what a thread threw, and std::runtime_error where
// some wait for ever, or wrote past their shared memory; with the block, and the thread where it is known.
void run_grid(const Shape& shape, const std::function<void()>& body);

// Order in which the threads go on: results that depend on it are a race.
void set_schedule(bool descending);

// Called by threads; where they stand is told if they wait for ever.
void sync_threads(const char* file, int line);
void sync_warp(const char* file, int line);
void sync_grid(const char* file, int line);
// Writes to `value` the one that lane `from` of the calling thread's warp brings. Throws where that lane
// is at an exchange in another line.
void exchange(void* value, std::size_t bytes, int from, const char* file, int line);
// Of a launch that may overlap those ahead, each thread has to call this; such a launch runs when they have
// ended all the same.
void wait_for_launches_ahead();
// The running block's shared memory.
void* shared_array(const void* key, std::size_t bytes);
void* dynamic_shared();

// A copy of the running thread's that is under way: begun, closed into a batch, and arrived once all but
// the `newest` batches are waited for. take_arrived() returns whether there is one, which the caller then
// does.
struct Copy {
    void* to;
    char value[16];
};
void begin_copy(const Copy& copy);
void close_batch_of_copies();
bool take_arrived(int newest, Copy& copy);

// Throws where it does not name all threads of a warp: those that it leaves out would not be waited for.
void check_whole_warp(unsigned mask);

// Throws where `address` is no multiple of `alignment`.
void check_alignment(const void* address, std::size_t alignment);

}  // namespace fastres::emu
