// Fetching what a task will read next into the core's cache, a little at a time, while it computes.
//
// What the loops of an instruction set call is always inlined: a copy of its own that the linker finds
// first would be everyone's.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastres::cpu {

class Prefetch {
  public:
    // `pieces` of `bytes` each, `stride` bytes apart. Null is passed over.
    void add(const void* data, int64_t pieces, int64_t bytes, int64_t stride) {
        if (!data || pieces < 1 || bytes < 1 || count_ == kMost) return;
        operands_[count_++] = {static_cast<const char*>(data), pieces, bytes, stride};
        lines_ += pieces * ((bytes + kLine - 1) / kLine);
    }

    // Spreads all that was added over so many steps.
    void spread(int64_t steps) { lines_a_step_ = (lines_ + steps - 1) / std::max<int64_t>(1, steps); }

    [[gnu::always_inline]] void step() { fetch(lines_a_step_); }

    // Lines of the cache, of a step that is done in so many parts.
    [[gnu::always_inline]] int64_t lines_of_part(int64_t parts) const {
        return (lines_a_step_ + parts - 1) / parts;
    }

    [[gnu::always_inline]] void fetch(int64_t lines) {
        for (; lines > 0 && current_ < count_; --lines) {
            Operand& operand = operands_[current_];
            __builtin_prefetch(operand.data + offset_, /*write=*/0, /*locality=*/2);
            offset_ += kLine;
            if (offset_ < operand.bytes) continue;
            offset_ = 0;
            operand.data += operand.stride;
            if (--operand.pieces == 0) ++current_;
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    static constexpr int kMost = 4;
    struct Operand {
        const char* data;
        int64_t pieces, bytes, stride;
    };
    Operand operands_[kMost];
    int count_ = 0, current_ = 0;
    int64_t lines_ = 0, lines_a_step_ = 0, offset_ = 0;
};

}  // namespace fastres::cpu
