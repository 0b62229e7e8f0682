// The emulator's meaning of csrc/cuda/ptx.cuh. Memory is read when a copy begins, and shared memory is
// written when it has been waited for: until then NaN lies there.
#pragma once

#include "cuda_runtime.h"

namespace fastres::cuda {

inline void begin_in_stream_order() {
    emu::wait_for_launches_ahead();
}

inline void store_16_bytes(void* global, const uint4& value) {
    *static_cast<uint4*>(global) = value;
}

inline void copy_16_bytes_async(void* shared, const void* global) {
    emu::check_alignment(shared, 16);
    emu::check_alignment(global, 16);
    emu::Copy copy{shared, {}};
    std::memcpy(copy.value, global, sizeof copy.value);
    std::memset(shared, 0xff, sizeof copy.value);
    emu::begin_copy(copy);
}
inline void close_batch_of_copies() {
    emu::close_batch_of_copies();
}
inline void wait_for_copies_but(int newest) {
    emu::Copy copy;
    while (emu::take_arrived(newest, copy)) std::memcpy(copy.to, copy.value, sizeof copy.value);
}

}  // namespace fastres::cuda
