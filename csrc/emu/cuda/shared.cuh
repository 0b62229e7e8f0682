// Shared memory of the emulator, in place of csrc/cuda/shared.cuh: each block that is alive has its own.
#pragma once

#include "cuda_runtime.h"

namespace fastres::cuda {

template <class Owner, class T, int n>
T* shared_array() {
    static const char key = 0;
    return static_cast<T*>(emu::shared_array(&key, n * sizeof(T)));
}

inline void* dynamic_shared() {
    return emu::dynamic_shared();
}

}  // namespace fastres::cuda
