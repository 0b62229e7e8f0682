// Weights -> words, and sums -> gradients of weights.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

// Lines of memory that are written, or read, in turn and stay in the cache meanwhile.
inline constexpr int64_t kLinesAtOnce = 64;

// Rows of a weight are apart, and too many for the processor to see where each goes on: they are fetched so
// many ahead. All of ResNet-50's take 0.75x of the time, a step 0.99x.
inline constexpr int64_t kRowsAhead = 48;

inline void fetch_soon(const void* data) {
    __builtin_prefetch(data, /*write=*/0, /*locality=*/2);
}

using Square = Vec<float>[kLanes<float>];  // rows

#if defined(__AVX512F__)
// Exchanges bit `bit` of a value's row with the same bit of its lane.
template <int bit>
FASTRES_ALWAYS void exchange(Square& rows) {
    const I32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32 upper = (lane & bit) != 0;
    const I32 second = lane + kLanes<float>;
    const auto even = reinterpret_cast<__m512i>(upper ? second - bit : lane);
    const auto odd = reinterpret_cast<__m512i>(upper ? second : lane + bit);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) {
        if (i & bit) continue;
        const __m512 a = reinterpret_cast<__m512>(rows[i]), b = reinterpret_cast<__m512>(rows[i + bit]);
        rows[i] = reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(a, even, b));
        rows[i + bit] = reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(a, odd, b));
    }
}
FASTRES_ALWAYS void transpose(Square& rows) {
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
}
#elif defined(__AVX2__)
FASTRES_ALWAYS void transpose(Square& rows) {
    __m256 pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        const auto first = reinterpret_cast<__m256>(rows[i]),
                   second = reinterpret_cast<__m256>(rows[i + 1]);
        pairs[i] = _mm256_unpacklo_ps(first, second);
        pairs[i + 1] = _mm256_unpackhi_ps(first, second);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) {
        constexpr int lower = 0x44, upper = 0xee;  // halves of both
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], lower);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], upper);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], lower);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], upper);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        rows[i] = reinterpret_cast<Vec<float>>(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        rows[i + 4] = reinterpret_cast<Vec<float>>(_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
}
#else
FASTRES_ALWAYS void transpose(Square& rows) {
    for (int i = 0; i < kLanes<float>; ++i) {
        for (int j = 0; j < i; ++j) {
            const float below = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = below;
        }
    }
}
#endif

template <class Words, class T, int block>
FASTRES_ALWAYS void pack_weight_of(const WeightBlock& weight, float* words) {
    constexpr int pack = Words::pack, lanes = kLanes<float>;
    const T* data = static_cast<const T*>(weight.data);
    const int64_t k_words = (weight.k + pack - 1) / pack;
    const auto value = [&](int64_t k, int64_t n) FASTRES_INLINE_BODY {
        if (k >= weight.k) return 0.0f;
        return to_real(data[k * weight.k_stride + n * weight.n_stride]);
    };
    if (weight.n_stride == 1 && weight.n % lanes == 0 && weight.k % pack == 0) {
        for (int64_t word = 0; word < k_words; ++word) {
            const T* first = data + word * pack * weight.k_stride;
            const T* second = pack == 2 ? first + weight.k_stride : first;
            const T* soon = first + kRowsAhead * weight.k_stride;
            for (int64_t n = 0; n < weight.n; n += lanes) {
                store<false>(words + word * block + n,
                             Words::template pair<float>(load(first + n), load(second + n)));
                fetch_soon(soon + n);
                if constexpr (pack == 2) fetch_soon(soon + weight.k_stride + n);
            }
        }
    } else if (weight.k_stride == 1 && weight.n % lanes == 0 && weight.k % (pack * lanes) == 0) {
        for (int64_t n = 0; n < weight.n; n += lanes) {
            for (int64_t word = 0; word < k_words; word += lanes) {
                Square square;
                for (int i = 0; i < lanes; ++i) {
                    const T* row = data + (n + i) * weight.n_stride + word * pack;
                    square[i] = Words::load_weights(row);
                    const T* next = row + lanes * weight.n_stride;
                    fetch_soon(next);
                    fetch_soon(next + pack * lanes - 1);
                }
                transpose(square);
                for (int i = 0; i < lanes; ++i) store<false>(words + (word + i) * block + n, square[i]);
            }
        }
    } else {
        for (int64_t begin = 0; begin < k_words; begin += kLinesAtOnce) {
            const int64_t end = begin + kLinesAtOnce < k_words ? begin + kLinesAtOnce : k_words;
            for (int64_t n = 0; n < weight.n; ++n)
                for (int64_t word = begin; word < end; ++word)
                    words[word * block + n] = Words::template pair<float>(
                        value(word * pack, n), pack == 2 ? value(word * pack + 1, n) : 0.0f);
        }
    }
    for (int64_t word = 0; word < k_words; ++word)
        for (int64_t n = weight.n; n < block; ++n) words[word * block + n] = 0;
}

template <class T, bool stream>
FASTRES_ALWAYS void unpack_squares(const float* sums, int64_t sums_stride, const WeightBlock& weight) {
    constexpr int lanes = kLanes<float>;
    T* data = static_cast<T*>(weight.data);
    for (int64_t n = 0; n < weight.n; n += lanes) {
        for (int64_t k = 0; k < weight.k; k += lanes) {
            Square square;
            for (int i = 0; i < lanes; ++i) square[i] = load(sums + (k + i) * sums_stride + n);
            transpose(square);
            for (int i = 0; i < lanes; ++i) store<stream>(data + (n + i) * weight.n_stride + k, square[i]);
        }
    }
    if (stream) fence();
}

template <class T, bool stream>
FASTRES_ALWAYS void unpack_rows(const float* sums, int64_t sums_stride, const WeightBlock& weight) {
    T* data = static_cast<T*>(weight.data);
    for (int64_t k = 0; k < weight.k; ++k)
        for (int64_t n = 0; n < weight.n; n += kLanes<float>)
            store<stream>(data + k * weight.k_stride + n, load(sums + k * sums_stride + n));
    if (stream) fence();
}

template <class T>
FASTRES_ALWAYS void unpack_weight_of(const float* sums, int64_t sums_stride, const WeightBlock& weight) {
    constexpr int lanes = kLanes<float>;
    T* data = static_cast<T*>(weight.data);
    // Past the caches where that can be: nobody reads gradients of weights soon.
    const auto streams = [&](int64_t row_stride) {
        constexpr int64_t alignment = kVectorBytes;
        return sizeof(T) == sizeof(float) && row_stride * sizeof(T) % alignment == 0 &&
               reinterpret_cast<uintptr_t>(data) % alignment == 0;
    };
    if (weight.n_stride == 1 && weight.n % lanes == 0)
        return streams(weight.k_stride) ? unpack_rows<T, true>(sums, sums_stride, weight)
                                        : unpack_rows<T, false>(sums, sums_stride, weight);
    if (weight.k_stride == 1 && weight.k % lanes == 0 && weight.n % lanes == 0)
        return streams(weight.n_stride) ? unpack_squares<T, true>(sums, sums_stride, weight)
                                        : unpack_squares<T, false>(sums, sums_stride, weight);
    for (int64_t begin = 0; begin < weight.k; begin += kLinesAtOnce) {
        const int64_t end = begin + kLinesAtOnce < weight.k ? begin + kLinesAtOnce : weight.k;
        for (int64_t n = 0; n < weight.n; ++n)
            for (int64_t k = begin; k < end; ++k)
                from_real(sums[k * sums_stride + n], data[k * weight.k_stride + n * weight.n_stride]);
    }
}

template <class Words, int block>
void pack_weight(const WeightBlock& weight, float* words) {
    switch (weight.dtype) {
        case Dtype::f32:
            return pack_weight_of<Words, float, block>(weight, words);
        case Dtype::bf16:
            return pack_weight_of<Words, bf16, block>(weight, words);
        default:
            return pack_weight_of<Words, f16, block>(weight, words);
    }
}

inline void unpack_weight(const float* sums, int64_t sums_stride, const WeightBlock& weight) {
    switch (weight.dtype) {
        case Dtype::f32:
            return unpack_weight_of<float>(sums, sums_stride, weight);
        case Dtype::bf16:
            return unpack_weight_of<bf16>(sums, sums_stride, weight);
        default:
            return unpack_weight_of<f16>(sums, sums_stride, weight);
    }
}

}  // namespace fastres::cpu::FASTRES_ISA
