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

// What a prologue does to one lane, or vector, of channels: c and those behind it of the row's.
template <class T, class Lane, Prologue kind, bool with_relu>
struct Prepare {
    Lane mean{}, scale{}, shift{}, mean_grad{}, slope{};

    FASTRES_INLINE_BODY Prepare(const PixelRow& row, int64_t c) {
        const PrologueCoefficients& by = row.prologue;
        const int64_t channel = row.first_channel + c;
        if constexpr (kind != Prologue::none) {
            mean = load_as<Lane>(by.mean + channel);
            scale = load_as<Lane>(by.scale + channel);
        }
        if constexpr (kind == Prologue::activation || with_relu) shift = load_as<Lane>(by.shift + channel);
        if constexpr (kind == Prologue::gradient) {
            mean_grad = load_as<Lane>(by.mean_grad + channel);
            slope = load_as<Lane>(by.slope + channel);
        }
    }

    // The value of the pixel at this element, not rounded.
    FASTRES_INLINE_BODY Lane operator()(const PixelRow& row, int64_t element, int64_t c) const {
        Lane value = load_as<Lane>(static_cast<const T*>(row.row) + element + c);
        if constexpr (kind == Prologue::activation) {
            value = normalise(value, mean, scale, shift);
            if constexpr (with_relu) value = relu(value);
        }
        if constexpr (kind == Prologue::gradient) {
            const Lane deviation = load_as<Lane>(static_cast<const T*>(row.input) + element + c) - mean;
            if constexpr (with_relu) value = mask_recomputed<T>(value, deviation, scale, shift);
            value = input_gradient(value, deviation, scale, mean_grad, slope);
        }
        return value;
    }
};

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

// Pixels that share the coefficients that were loaded for a vector of channels.
inline constexpr int kPixelsAtOnce = 4;

template <class Words, class T>
struct LoadChannels {
    const PixelRow& row;
    float* words;

    template <Prologue kind, bool with_relu>
    void run() const {
        if constexpr (kind == Prologue::none && Words::pack * sizeof(T) == sizeof(float)) return copy();
        int64_t i = 0;
        while (i < row.columns) {
            if (element_of(row, i) < 0) {
                memset(words + i * words_of_pixel(), 0, words_of_pixel() * sizeof(float));
                ++i;
            } else if (element_of(row, i + kPixelsAtOnce - 1) < 0) {
                pixels<kind, with_relu, 1>(i);
                ++i;
            } else {
                pixels<kind, with_relu, kPixelsAtOnce>(i);
                i += kPixelsAtOnce;
            }
        }
    }

  private:
    int64_t words_of_pixel() const { return (row.channels + Words::pack - 1) / Words::pack; }

    // Values as they are stored: those of the row's inside follow each other.
    void copy() const {
        const int64_t size = words_of_pixel();
        int64_t begin = 0, end = row.columns;
        while (begin < end && element_of(row, begin) < 0) ++begin;
        while (begin < end && element_of(row, end - 1) < 0) --end;
        memset(words, 0, begin * size * sizeof(float));
        memset(words + end * size, 0, (row.columns - end) * size * sizeof(float));
        if (begin == end) return;
        const T* in = static_cast<const T*>(row.row) + element_of(row, begin);
        T* out = reinterpret_cast<T*>(words + begin * size);
        const int64_t step = row.column_step * row.pixel_stride, out_step = size * Words::pack;
        if (step == row.channels && out_step == row.channels) {
            memcpy(out, in, (end - begin) * step * sizeof(T));
            return;
        }
        constexpr int64_t few = 4;  // for which a call takes longer than the copy
        for (int64_t i = begin; i < end; ++i, in += step, out += out_step) {
            if (row.channels < few) {
                for (int64_t c = 0; c < row.channels; ++c) out[c] = in[c];
            } else {
                memcpy(out, in, row.channels * sizeof(T));
            }
            if (out_step > row.channels) memset(out + row.channels, 0, sizeof(T));
        }
    }

    template <Prologue kind, bool with_relu, int count>
    FASTRES_INLINE_BODY void pixels(int64_t first) const {
        constexpr int lanes = kLanes<float>;
        const int64_t element = element_of(row, first), step = row.column_step * row.pixel_stride;
        const int64_t size = words_of_pixel();
        float* out = words + first * size;
        if constexpr (Words::pack == 2) {
            T* values = reinterpret_cast<T*>(out);
            for (int p = 0; p < count; ++p) out[p * size + size - 1] = 0;
            int64_t c = 0;
            for (; c + 2 * lanes <= row.channels; c += 2 * lanes) {
                const Prepare<T, Vec<float>, kind, with_relu> left(row, c), right(row, c + lanes);
#pragma GCC unroll 4
                for (int p = 0; p < count; ++p) {
                    Vec<float> a = left(row, element + p * step, c);
                    Vec<float> b = right(row, element + p * step, c + lanes);
                    store_rounded<false>(values + p * 2 * size + c, a, b);
                }
            }
            for (; c < row.channels; ++c) {
                const Prepare<T, float, kind, with_relu> prepare(row, c);
                for (int p = 0; p < count; ++p)
                    from_real(prepare(row, element + p * step, c), values[p * 2 * size + c]);
            }
        } else {
            int64_t c = 0;
            for (; c + lanes <= row.channels; c += lanes) {
                const Prepare<T, Vec<float>, kind, with_relu> prepare(row, c);
#pragma GCC unroll 4
                for (int p = 0; p < count; ++p)
                    store<false>(out + p * size + c, rounded_to<T>(prepare(row, element + p * step, c)));
            }
            for (; c < row.channels; ++c) {
                const Prepare<T, float, kind, with_relu> prepare(row, c);
                for (int p = 0; p < count; ++p)
                    out[p * size + c] = rounded_to<T>(prepare(row, element + p * step, c));
            }
        }
    }
};

template <class Words, class T>
void load_channels(const PixelRow& row, float* words) {
    with_prologue(row.prologue, LoadChannels<Words, T>{row, words});
}

// Words of the gradient of the weight: a channel, or a vector of them, of two pixels or of one.
template <class Words, class T, class Lane, Prologue kind, bool with_relu>
struct PrepareWord {
    Prepare<T, Lane, kind, with_relu> prepare;

    // Of the pixels at these elements; zero where one is negative, unless all are known to be inside.
    template <bool inside = false>
    FASTRES_INLINE_BODY Lane of(const PixelRow& row, int64_t first, int64_t second, int64_t c) const {
        constexpr bool two = Words::pack == 2;
        if constexpr (kind == Prologue::none && two && sizeof(Lane) > sizeof(float)) {
            const T* channels = static_cast<const T*>(row.row) + c;
            return Words::pair_of(inside || first >= 0 ? channels + first : nullptr,
                                  inside || second >= 0 ? channels + second : nullptr);
        }
        const Lane a = inside || first >= 0 ? prepare(row, first, c) : Lane{};
        const Lane b = two && (inside || second >= 0) ? prepare(row, second, c) : Lane{};
        return Words::template pair<T>(a, b);
    }
};

template <class Words, class T>
struct LoadPixels {
    const PixelRow& row;
    int64_t width;
    float* words;
    int64_t block_stride;

    template <Prologue kind, bool with_relu>
    void run() const {
        if constexpr (Words::pack == 1) {
            if (row.channels == width)
                return LoadChannels<Words, T>{row, words}.template run<kind, with_relu>();
        }
        const int64_t total = (row.columns + Words::pack - 1) / Words::pack;
        int64_t step = 0;
        while (step < total) {
            const int64_t last = step * Words::pack + kPixelsAtOnce - 1;
            if (element_of(row, step * Words::pack) >= 0 && element_of(row, last) >= 0) {
                steps<kind, with_relu, kStepsAtOnce, true>(step);
                step += kStepsAtOnce;
            } else {
                steps<kind, with_relu, 1, false>(step++);
            }
        }
    }

  private:
    static constexpr int kStepsAtOnce = kPixelsAtOnce / Words::pack;

    template <Prologue kind, bool with_relu, int count, bool inside>
    FASTRES_INLINE_BODY void steps(int64_t step) const {
        constexpr int lanes = kLanes<float>;
        int64_t first[count], second[count];
        for (int s = 0; s < count; ++s) {
            first[s] = element_of(row, (step + s) * Words::pack);
            second[s] = Words::pack == 2 ? element_of(row, (step + s) * Words::pack + 1) : -1;
        }
        float* out = words + step * width;
        for (int64_t begin = 0; begin < row.channels; begin += width, out += block_stride) {
            const int64_t channels = begin + width < row.channels ? width : row.channels - begin;
            int64_t c = 0;
            for (; c + lanes <= channels; c += lanes) {
                const PrepareWord<Words, T, Vec<float>, kind, with_relu> word{{row, begin + c}};
#pragma GCC unroll 4
                for (int s = 0; s < count; ++s)
                    store<false>(out + s * width + c,
                                 word.template of<inside>(row, first[s], second[s], begin + c));
            }
            for (; c < channels; ++c) {
                const PrepareWord<Words, T, float, kind, with_relu> word{{row, begin + c}};
                for (int s = 0; s < count; ++s)
                    out[s * width + c] = word.template of<inside>(row, first[s], second[s], begin + c);
            }
            for (int s = 0; s < count; ++s)
                for (int64_t beyond = channels; beyond < width; ++beyond) out[s * width + beyond] = 0;
        }
    }
};

template <class Words, class T>
void load_pixels(const PixelRow& row, int64_t width, float* words, int64_t block_stride) {
    with_prologue(row.prologue, LoadPixels<Words, T>{row, width, words, block_stride});
}

}  // namespace fastres::cpu::FASTRES_ISA
