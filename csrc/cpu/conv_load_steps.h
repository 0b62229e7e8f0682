// Activations and gradients -> words, the steps of a channel side by side: where they are multiplied along
// the rows of a matrix. Loads of what crosses a line of the cache take twice as long, so that the steps
// which are multiplied at once begin at one: see Slots.
#pragma once

#include "cpu/conv_load.h"
#include "cpu/conv_weights.h"

namespace fastres::cpu::FASTRES_ISA {

template <class Words, class T>
struct LoadSteps {
    const PixelRow& row;
    float* words;
    int64_t channel_stride, first_step, steps_of_slot;

    template <Prologue kind, bool with_relu>
    void run() const {
        constexpr int64_t lanes = kLanes<float>;
        const int64_t steps = (row.columns + Words::pack - 1) / Words::pack;
        for (int64_t begin = 0; begin < steps; begin += lanes) {
            const int count = static_cast<int>(begin + lanes < steps ? lanes : steps - begin);
            int64_t first[lanes], second[lanes];
            for (int i = 0; i < count; ++i) {
                const int64_t pixel = (begin + i) * Words::pack;
                first[i] = element_of(row, pixel);
                second[i] = Words::pack == 2 ? element_of(row, pixel + 1) : -1;
            }
            int64_t c = 0;
            for (; c + lanes <= row.channels; c += lanes) {
                const PrepareWord<Words, T, Vec<float>, kind, with_relu> word{{row, c}};
                Square square;
                for (int i = 0; i < lanes; ++i)
                    square[i] = i < count ? word.of(row, first[i], second[i], c) : Vec<float>{};
                transpose(square);
                for_each_slot(begin, count, [&](float* out, int from, int to) FASTRES_INLINE_BODY {
                    const __mmask16 valid = static_cast<__mmask16>((1u << to) - (1u << from));
                    for (int i = 0; i < lanes; ++i)
                        _mm512_mask_storeu_ps(out + (c + i) * channel_stride, valid,
                                              reinterpret_cast<__m512>(square[i]));
                });
            }
            for (; c < row.channels; ++c) {
                const PrepareWord<Words, T, float, kind, with_relu> word{{row, c}};
                for_each_slot(begin, count, [&](float* out, int from, int to) {
                    for (int i = from; i < to; ++i)
                        out[c * channel_stride + i] = word.of(row, first[i], second[i], c);
                });
            }
        }
    }

  private:
    // Of `count` steps from the row's step `begin` on: calls store(out, from, to) for those that share a
    // slot, where step `from` goes to out[from].
    template <class Store>
    FASTRES_INLINE_BODY void for_each_slot(int64_t begin, int count, const Store& store) const {
        int64_t slot = (first_step + begin) / steps_of_slot, place = (first_step + begin) % steps_of_slot;
        for (int from = 0; from < count; ++slot, place = 0) {
            const int64_t fit = steps_of_slot - place;
            const int to = fit < count - from ? from + static_cast<int>(fit) : count;
            store(words + slot * Slots::kSize + place - from, from, to);
            from = to;
        }
    }
};

template <class Words, class T>
void load_steps(const PixelRow& row, float* words, int64_t channel_stride, int64_t first_step,
                int64_t steps) {
    with_prologue(row.prologue,
                  LoadSteps<Words, T>{row, words, channel_stride, first_step, Slots(steps).steps});
}

}  // namespace fastres::cpu::FASTRES_ISA
