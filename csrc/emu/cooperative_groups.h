// What csrc/cuda uses of CUDA's cooperative groups: the barrier of a whole grid.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
    void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
        fastres::emu::sync_grid(file, line);
    }
};
inline grid_group this_grid() {
    return {};
}

}  // namespace cooperative_groups
