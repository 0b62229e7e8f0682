// Activations and gradients -> words, through the batch norm that lies between.
#pragma once

#include "cpu/bn_lanes.h"
#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

// Where pixel `index` of a row is, in elements; -1 where it is zero.
FASTRES_ALWAYS int64_t element_of(const PixelRow& row, int64_t index) {
    const int64_t column = row.column + index * row.column_step;
    const bool inside = row.row && index < row.columns && column >= 0 && column < row.width;
    return inside ? column * row.pixel_stride + row.first_channel : -1;
}

// The value of channel c of the row's channels, after the prologue, not rounded.
template <class Lane, class T, Prologue kind, bool with_relu>
FASTRES_ALWAYS Lane value_of(const PixelRow& row, int64_t element, int64_t c) {
    Lane value = load_as<Lane>(static_cast<const T*>(row.row) + element + c);
    if constexpr (kind == Prologue::none) {
        return value;
    } else {
        const PrologueCoefficients& by = row.prologue;
        const int64_t channel = row.first_channel + c;
        const Lane mean = load_as<Lane>(by.mean + channel), scale = load_as<Lane>(by.scale + channel);
        if constexpr (kind == Prologue::activation) {
            value = normalise(value, mean, scale, load_as<Lane>(by.shift + channel));
            if constexpr (with_relu) value = relu(value);
        } else {
            const Lane deviation = load_as<Lane>(static_cast<const T*>(row.input) + element + c) - mean;
            if constexpr (with_relu)
                value = mask_recomputed<T>(value, deviation, scale, load_as<Lane>(by.shift + channel));
            value = input_gradient(value, deviation, scale, load_as<Lane>(by.mean_grad + channel),
                                   load_as<Lane>(by.slope + channel));
        }
        return value;
    }
}

// Calls load.run<kind, with_relu>().
template <class Load>
FASTRES_ALWAYS void with_prologue(const PrologueCoefficients& prologue, const Load& load) {
    switch (prologue.kind) {
        case Prologue::none:
            return load.template run<Prologue::none, false>();
        case Prologue::activation:
            return prologue.relu ? load.template run<Prologue::activation, true>()
                                 : load.template run<Prologue::activation, false>();
        case Prologue::gradient:
            return prologue.mask == Mask::recomputed ? load.template run<Prologue::gradient, true>()
                                                     : load.template run<Prologue::gradient, false>();
    }
}

template <class Words, class T>
struct LoadChannels {
    const PixelRow& row;
    float* words;

    template <Prologue kind, bool with_relu>
    void run() const {
        constexpr int lanes = kLanes<float>;
        const int64_t count = (row.channels + Words::pack - 1) / Words::pack;
        float* out = words;
        for (int64_t i = 0; i < row.columns; ++i, out += count) {
            const int64_t element = element_of(row, i);
            if (element < 0) {
                memset(out, 0, count * sizeof(float));
                continue;
            }
            int64_t c = 0;
            if constexpr (Words::pack == 2) {
                out[count - 1] = 0;
                T* values = reinterpret_cast<T*>(out);
                if constexpr (kind == Prologue::none) {
                    memcpy(values, static_cast<const T*>(row.row) + element, row.channels * sizeof(T));
                } else {
                    for (; c + 2 * lanes <= row.channels; c += 2 * lanes) {
                        Vec<float> a = value_of<Vec<float>, T, kind, with_relu>(row, element, c);
                        Vec<float> b = value_of<Vec<float>, T, kind, with_relu>(row, element, c + lanes);
                        store_rounded<false>(values + c, a, b);
                    }
                    for (; c < row.channels; ++c)
                        from_real(value_of<float, T, kind, with_relu>(row, element, c), values[c]);
                }
            } else {
                for (; c + lanes <= row.channels; c += lanes)
                    store<false>(out + c,
                                 rounded_to<T>(value_of<Vec<float>, T, kind, with_relu>(row, element, c)));
                for (; c < row.channels; ++c)
                    out[c] = rounded_to<T>(value_of<float, T, kind, with_relu>(row, element, c));
            }
        }
    }
};

template <class Words, class T>
void load_channels(const PixelRow& row, float* words) {
    with_prologue(row.prologue, LoadChannels<Words, T>{row, words});
}

// Channel c of two pixels, at these elements, or of one: words of the gradient of the weight.
template <class Words, class T, class Lane, Prologue kind, bool with_relu>
FASTRES_ALWAYS Lane word_of(const PixelRow& row, int64_t first, int64_t second, int64_t c) {
    const Lane a = first < 0 ? Lane{} : value_of<Lane, T, kind, with_relu>(row, first, c);
    const Lane b = second < 0 ? Lane{} : value_of<Lane, T, kind, with_relu>(row, second, c);
    return Words::template pair<T>(a, b);
}

template <class Words, class T>
struct LoadPixels {
    const PixelRow& row;
    int64_t width;
    float* words;
    int64_t block_stride;

    template <Prologue kind, bool with_relu>
    void run() const {
        constexpr int lanes = kLanes<float>;
        float* out_of_step = words;
        for (int64_t i = 0; i < row.columns; i += Words::pack, out_of_step += width) {
            const int64_t first = element_of(row, i);
            const int64_t second = Words::pack == 2 ? element_of(row, i + 1) : -1;
            float* out = out_of_step;
            for (int64_t begin = 0; begin < row.channels; begin += width, out += block_stride) {
                const int64_t channels = begin + width < row.channels ? width : row.channels - begin;
                int64_t c = 0;
                if (first >= 0 || second >= 0) {
                    for (; c + lanes <= channels; c += lanes)
                        store<false>(out + c, word_of<Words, T, Vec<float>, kind, with_relu>(
                                                  row, first, second, begin + c));
                    for (; c < channels; ++c)
                        out[c] = word_of<Words, T, float, kind, with_relu>(row, first, second, begin + c);
                }
                for (; c < width; ++c) out[c] = 0;
            }
        }
    }
};

template <class Words, class T>
void load_pixels(const PixelRow& row, int64_t width, float* words, int64_t block_stride) {
    with_prologue(row.prologue, LoadPixels<Words, T>{row, width, words, block_stride});
}

}  // namespace fastres::cpu::FASTRES_ISA
