// The maximum over windows of channels-last pixels, and its gradient, for one row of pixels.
#pragma once

#include "core/max_pool.h"
#include "cpu/kernels.h"
#include "cpu/sweep.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

// Which pixel of its window each lane means: a byte in memory.
template <class Integers>
struct PlainTaps {
    using type = Integers;
    FASTRES_ALWAYS type all(int tap) { return type{} + tap; }
};
template <class Lane>
struct TapsOf : PlainTaps<int> {};
template <>
struct TapsOf<Vec<double>> : PlainTaps<VectorOf<int64_t, kLanes<double>>::type> {};
#if defined(__AVX512F__)
template <>
struct TapsOf<Vec<float>> {
    using type = __m128i;
    FASTRES_ALWAYS type all(int tap) { return _mm_set1_epi8(static_cast<char>(tap)); }
};
#else
template <>
struct TapsOf<Vec<float>> : PlainTaps<I32> {};
#endif

// As PyTorch does: the first of equal ones, and of NaNs the last.
template <class Lane, class Taps>
FASTRES_ALWAYS void keep_larger(Lane& largest, Taps& index, Lane value, int tap) {
    const auto taken = (value > largest) | (value != value);
    largest = taken ? value : largest;
    index = taken ? Taps{} + tap : index;
}
// Adds the gradients of the windows whose largest pixel is their `tap`-th.
template <class Lane>
FASTRES_ALWAYS void add_where_tap(Lane& sum, Lane grad, const uint8_t* index, int tap) {
    if constexpr (sizeof(Lane) <= sizeof(double)) {
        sum += *index == tap ? grad : Lane{};
    } else {
        using Taps = typename TapsOf<Lane>::type;
        typename VectorOf<uint8_t, sizeof(Taps) / sizeof(Taps{}[0])>::type bytes;
        memcpy(&bytes, index, sizeof bytes);
        sum += __builtin_convertvector(bytes, Taps) == Taps{} + tap ? grad : Lane{};
    }
}
template <class Taps>
FASTRES_ALWAYS void store_taps(uint8_t* p, Taps taps) {
    const auto bytes =
        __builtin_convertvector(taps, typename VectorOf<uint8_t, sizeof(Taps) / sizeof(Taps{}[0])>::type);
    memcpy(p, &bytes, sizeof bytes);
}
FASTRES_ALWAYS void store_taps(uint8_t* p, int tap) {
    *p = static_cast<uint8_t>(tap);
}
#if defined(__AVX512F__)
FASTRES_ALWAYS void keep_larger(Vec<float>& largest, __m128i& index, Vec<float> value, int tap) {
    const __m512 v = reinterpret_cast<__m512>(value), old = reinterpret_cast<__m512>(largest);
    const __mmask16 taken = _mm512_cmp_ps_mask(v, old, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    largest = reinterpret_cast<Vec<float>>(_mm512_mask_mov_ps(old, taken, v));
    index = _mm_mask_mov_epi8(index, taken, TapsOf<Vec<float>>::all(tap));
}
FASTRES_ALWAYS void add_where_tap(Vec<float>& sum, Vec<float> grad, const uint8_t* index, int tap) {
    const __mmask16 own = _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)),
                                              TapsOf<Vec<float>>::all(tap));
    const __m512 before = reinterpret_cast<__m512>(sum);
    sum = reinterpret_cast<Vec<float>>(
        _mm512_mask_add_ps(before, own, before, reinterpret_cast<__m512>(grad)));
}
FASTRES_ALWAYS void store_taps(uint8_t* p, __m128i taps) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), taps);
}
#endif

// The channels of a pixel in groups of vectors, in vectors, and one by one: body(Step, first channel).
template <class Real, class Body>
FASTRES_ALWAYS void sweep_channels(int64_t channels, const Body& body) {
    constexpr int unroll = 4;
    constexpr int64_t width = kLanes<Real>;
    int64_t c = 0;
    for (; c + unroll * width <= channels; c += unroll * width) body(Step<Vec<Real>, unroll>{}, c);
    for (; c + width <= channels; c += width) body(Step<Vec<Real>, 1>{}, c);
    for (; c < channels; ++c) body(Step<Real, 1>{}, c);
}

inline constexpr int kMostTaps = MaxPool2d::most_taps;

template <class T>
void max_pool(const MaxPoolRow& row) {
    using Real = RealOf<T>;
    const T* pixels[kMostTaps];
    int taps[kMostTaps];
    for (int64_t column = 0; column < row.out_width; ++column) {
        const int64_t first = column * row.stride - row.padding;
        const int64_t begin = first < 0 ? -first : 0;
        const int64_t end = row.width - first < row.kernel_w ? row.width - first : row.kernel_w;
        int count = 0;
        for (int64_t i = 0; i < row.kernel_h; ++i) {
            if (!row.rows[i]) continue;
            for (int64_t j = begin; j < end; ++j) {
                pixels[count] = static_cast<const T*>(row.rows[i]) + (first + j) * row.channels;
                taps[count++] = static_cast<int>(i * row.kernel_w + j);
            }
        }
        T* output = static_cast<T*>(row.output) + column * row.channels;
        uint8_t* indices = row.index + column * row.channels;
        sweep_channels<Real>(row.channels, [&](auto step, int64_t c) FASTRES_INLINE_BODY {
            using S = decltype(step);
            using Lane = typename S::Lane;
            Lane largest[S::unroll];
            typename TapsOf<Lane>::type index[S::unroll];
#pragma GCC unroll 4
            for (int i = 0; i < S::unroll; ++i) {
                largest[i] = Lane{} - __builtin_inff();
                index[i] = TapsOf<Lane>::all(taps[0]);  // should there be nothing but -inf
            }
            for (int k = 0; k < count; ++k) {
#pragma GCC unroll 4
                for (int i = 0; i < S::unroll; ++i)
                    keep_larger(largest[i], index[i], load_as<Lane>(pixels[k] + c + i * kLanes<Real>),
                                taps[k]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < S::unroll; ++i) {
                store_as<false>(output + c + i * kLanes<Real>, largest[i]);
                store_taps(indices + c + i * kLanes<Real>, index[i]);
            }
        });
    }
}

template <class T>
void max_pool_grad(const MaxPoolGradRow& row) {
    using Real = RealOf<T>;
    const T* grads[kMostTaps];
    const uint8_t* indices[kMostTaps];
    int taps[kMostTaps];
    int64_t begin = 0, end = 0;  // the windows of a row of the output that see the column
    for (int64_t column = 0; column < row.width; ++column) {
        const int64_t padded = column + row.padding;
        while (end < row.out_width && end * row.stride <= padded) ++end;
        while (begin < end && begin * row.stride + row.kernel_w <= padded) ++begin;
        int count = 0;
        for (int64_t i = 0; i < row.count; ++i) {
            for (int64_t out = begin; out < end; ++out) {
                grads[count] = static_cast<const T*>(row.windows[i].grad) + out * row.channels;
                indices[count] = row.windows[i].index + out * row.channels;
                taps[count++] = row.windows[i].first_tap + static_cast<int>(padded - out * row.stride);
            }
        }
        T* grad_input = static_cast<T*>(row.grad_input) + column * row.channels;
        sweep_channels<Real>(row.channels, [&](auto step, int64_t c) FASTRES_INLINE_BODY {
            using S = decltype(step);
            using Lane = typename S::Lane;
            Lane sums[S::unroll] = {};
            for (int k = 0; k < count; ++k) {
#pragma GCC unroll 4
                for (int i = 0; i < S::unroll; ++i) {
                    const int64_t at = c + i * kLanes<Real>;
                    add_where_tap(sums[i], load_as<Lane>(grads[k] + at), indices[k] + at, taps[k]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < S::unroll; ++i) store_as<false>(grad_input + c + i * kLanes<Real>, sums[i]);
        });
    }
}

}  // namespace fastres::cpu::FASTRES_ISA
