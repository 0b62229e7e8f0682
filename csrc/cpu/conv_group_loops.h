// The products of grouped convolutions. A vector of channels holds several groups, or a part of one: where
// a channel of one operand meets all of its group's of the other, these are brought to its lane one by one.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

// As many as the registers hold beside three taps, a vector of `a`, and which words of it are taken.
#if defined(__AVX512F__)
inline constexpr int kGroupRows = 14;
#else
inline constexpr int kGroupRows = 7;
#endif

FASTRES_ALWAYS I32 load_words(const int32_t* words) {
    I32 v;
    memcpy(&v, words, sizeof v);
    return v;
}

FASTRES_ALWAYS Vec<float> select(Vec<float> from, I32 words) {
#if defined(__clang__)
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = from[words[i]];
    return v;
#else
    return __builtin_shuffle(from, words);
#endif
}

// Long sums are added up in parts, at a few instructions more of a hundred: PyTorch's of floats are as
// exact.
inline constexpr int64_t kMostGroupTerms = 64;

// Each word of a pixel is brought to its lanes once for all taps of a run that see the pixel.
template <class Words, int block, int rows, int taps, int pixel_step>
void multiply_group_tile(const MultiplyGroups& tile) {
    constexpr int lanes = kLanes<float>;
    constexpr int pixels = (rows - 1) * pixel_step + taps;
    Vec<float> sums[rows];
    bool add = false;
    const auto store_sums = [&] {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            float* out = tile.sums + r * tile.sums_stride;
            store<false>(out, add ? load(out) + sums[r] : sums[r]);
            sums[r] = Vec<float>{};
        }
        add = true;
    };
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sums[r] = Vec<float>{};
    int64_t terms = 0;
    for (int64_t run = 0; run < tile.run_count; ++run) {
        if (terms + taps * tile.steps > kMostGroupTerms && terms > 0) {
            store_sums();
            terms = 0;
        }
        terms += taps * tile.steps;
        const float* b = tile.b + run * taps * tile.steps * block;
        for (int64_t step = 0; step < tile.steps; ++step, b += block) {
            const I32 words = load_words(tile.words + step % lanes * lanes);
            const float* a = tile.a + tile.runs[run] + step / lanes * lanes;
            Vec<float> weights[taps];
#pragma GCC unroll 4
            for (int tap = 0; tap < taps; ++tap) weights[tap] = load(b + tap * tile.steps * block);
#pragma GCC unroll 32
            for (int pixel = 0; pixel < pixels; ++pixel, a += tile.pixel_stride) {
                const Vec<float> value = select(load(a), words);
#pragma GCC unroll 4
                for (int tap = 0; tap < taps; ++tap) {
                    const int r = (pixel - tap) / pixel_step;
                    if (pixel >= tap && (pixel - tap) % pixel_step == 0 && r < rows)
                        sums[r] = Words::multiply_add(sums[r], weights[tap], value);
                }
            }
        }
    }
    store_sums();
}

template <class Words, int rows, int block>
void multiply_groups(const MultiplyGroups& tile) {
    if constexpr (rows > 0) {
        if (tile.rows < rows) return multiply_groups<Words, rows - 1, block>(tile);
        if (tile.taps == 1) return multiply_group_tile<Words, block, rows, 1, 1>(tile);
        if (tile.pixel_step == 1) return multiply_group_tile<Words, block, rows, 3, 1>(tile);
        multiply_group_tile<Words, block, rows, 3, kMostPixelStep>(tile);
    }
}

// Some channels of each lane's group, for some entries of the kernel. A large group's are the same for all
// lanes.
template <class Words, int channels, int taps, bool large>
FASTRES_ALWAYS void multiply_group_channels(const MultiplyGroupPixels& tile, int64_t first_tap,
                                            int64_t first_channel) {
    constexpr int lanes = kLanes<float>;
    Vec<float> sums[taps][channels];
    I32 words[channels];
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) {
        if constexpr (!large) words[c] = load_words(tile.words + c * lanes);
#pragma GCC unroll 4
        for (int tap = 0; tap < taps; ++tap) sums[tap][c] = Vec<float>{};
    }
    const float* input = tile.input + first_channel / lanes * tile.vector_stride + first_channel % lanes;
    const float* grad = tile.grad;
    for (int64_t run = 0; run < tile.run_count; ++run) {
        const float* pixels[taps];
#pragma GCC unroll 4
        for (int tap = 0; tap < taps; ++tap)
            pixels[tap] = input + tile.runs[run] + tile.taps[first_tap + tap];
        for (int64_t step = 0; step < tile.steps; ++step, grad += lanes) {
            const Vec<float> of_grad = load(grad);
#pragma GCC unroll 4
            for (int tap = 0; tap < taps; ++tap) {
#pragma GCC unroll 8
                for (int c = 0; c < channels; ++c) {
                    if constexpr (large)
                        Words::multiply_add_memory(sums[tap][c], of_grad, pixels[tap] + c);
                    else
                        sums[tap][c] =
                            Words::multiply_add(sums[tap][c], of_grad, select(load(pixels[tap]), words[c]));
                }
                pixels[tap] += tile.input_stride;
            }
        }
    }
#pragma GCC unroll 4
    for (int tap = 0; tap < taps; ++tap) {
#pragma GCC unroll 8
        for (int c = 0; c < channels; ++c) {
            float* out =
                tile.sums + ((first_tap + tap) * tile.channels + first_channel + c) * tile.sums_stride;
            store<false>(out, tile.add ? load(out) + sums[tap][c] : sums[tap][c]);
        }
    }
}

// In sums that the registers hold: `taps` entries of the kernel at a time, and what is left one by one.
template <class Words, int channels, int taps, bool large>
FASTRES_ALWAYS void multiply_all_channels(const MultiplyGroupPixels& tile) {
    for (int64_t c = 0; c < tile.channels; c += channels) {
        int64_t tap = 0;
        for (; tap + taps <= tile.tap_count; tap += taps)
            multiply_group_channels<Words, channels, taps, large>(tile, tap, c);
        for (; tap < tile.tap_count; ++tap)
            multiply_group_channels<Words, channels, 1, large>(tile, tap, c);
    }
}

template <class Words>
void multiply_group_pixels(const MultiplyGroupPixels& tile) {
    if (tile.channels == 4) return multiply_all_channels<Words, 4, 3, false>(tile);
#if defined(__AVX512F__)
    if (tile.channels == 8) return multiply_all_channels<Words, 8, 1, false>(tile);
    multiply_all_channels<Words, 8, 3, true>(tile);
#else
    multiply_all_channels<Words, 4, 3, true>(tile);
#endif
}

}  // namespace fastres::cpu::FASTRES_ISA
