// Scratch memory that outlives a call.
#pragma once

#include <cstdint>

#include "cpu/aligned_vector.h"

namespace fastres::cpu {

// Memory of a thread that stays with it from one convolution to the next.
class Workspace {
  public:
    // At least so many floats, with what was there before, or not.
    float* floats(int64_t count) {
        if (static_cast<int64_t>(memory_.size()) < count) {
            memory_ = {};
            memory_ = AlignedVector<float>(count);
        }
        return memory_.data();
    }

  private:
    AlignedVector<float> memory_;
};

}  // namespace fastres::cpu
