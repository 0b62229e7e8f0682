// Activations and gradients -> words, the steps of a channel side by side: where they are multiplied along
// the rows of a matrix.
#pragma once

#include "cpu/conv_load.h"
#include "cpu/conv_weights.h"

namespace fastres::cpu::FASTRES_ISA {

template <class Words, class T>
struct LoadSteps {
    const PixelRow& row;
    float* words;
    int64_t channel_stride;

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
            float* out = words + begin;
            int64_t c = 0;
            for (; c + lanes <= row.channels; c += lanes) {
                const PrepareWord<Words, T, Vec<float>, kind, with_relu> word{{row, c}};
                Square square;
                for (int i = 0; i < lanes; ++i)
                    square[i] = i < count ? word.of(row, first[i], second[i], c) : Vec<float>{};
                transpose(square);
                const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
                for (int i = 0; i < lanes; ++i)
                    _mm512_mask_storeu_ps(out + (c + i) * channel_stride, valid,
                                          reinterpret_cast<__m512>(square[i]));
            }
            for (; c < row.channels; ++c) {
                const PrepareWord<Words, T, float, kind, with_relu> word{{row, c}};
                for (int i = 0; i < count; ++i)
                    out[c * channel_stride + i] = word.of(row, first[i], second[i], c);
            }
        }
    }
};

template <class Words, class T>
void load_steps(const PixelRow& row, float* words, int64_t channel_stride) {
    with_prologue(row.prologue, LoadSteps<Words, T>{row, words, channel_stride});
}

}  // namespace fastres::cpu::FASTRES_ISA
