// The words that the convolutions multiply (cpu/conv_kernels.h), and the rounding of what goes into them.
#pragma once

#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

// A value as it comes back from memory where it was stored as T.
template <class T>
FASTRES_ALWAYS float rounded_to(float value) {
    T stored;
    from_real(value, stored);
    return to_real(stored);
}
template <class T>
FASTRES_ALWAYS Vec<float> rounded_to(Vec<float> v) {
    T stored[kLanes<float>];
    store<false>(stored, v);
    return load(stored);
}
template <>
inline __attribute__((always_inline)) Vec<float> rounded_to<float>(Vec<float> v) {
    return v;
}
template <>
inline __attribute__((always_inline)) Vec<float> rounded_to<bf16>(Vec<float> v) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)))),
        16));
#else
    return reinterpret_cast<Vec<float>>(bf16_bits(v) << 16);
#endif
}

// Two neighbouring vectors, rounded to T and stored; afterwards they hold what was stored.
template <bool stream, class T>
FASTRES_ALWAYS void store_rounded(T* p, Vec<float>& a, Vec<float>& b) {
    store_pair<stream>(p, a, b);
    a = rounded_to<T>(a);
    b = rounded_to<T>(b);
}
#if defined(__AVX512BF16__)
// The instruction takes subnormal numbers for zero, which vec.h's rounding does not.
FASTRES_ALWAYS __m512bh round_pair(Vec<float> first, Vec<float> second) {
    return _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
}
template <bool stream>
FASTRES_ALWAYS void store_rounded(bf16* p, Vec<float>& a, Vec<float>& b) {
    const __m512i both = reinterpret_cast<__m512i>(round_pair(a, b));
    if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
        _mm512_storeu_si512(p, both);
    }
    a = reinterpret_cast<Vec<float>>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
    b = reinterpret_cast<Vec<float>>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
}
#endif

FASTRES_ALWAYS Vec<float> broadcast(float value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec<float>>(_mm512_set1_ps(value));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec<float>>(_mm256_set1_ps(value));
#else
    return Vec<float>{} + value;
#endif
}

// A word is a float.
struct FloatWords {
    static constexpr int pack = 1;

    FASTRES_ALWAYS Vec<float> multiply_add(Vec<float> sum, Vec<float> words, Vec<float> others) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        // With 16 registers it matters that the sum stays in its own, for which GCC does not always care.
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(words), "x"(others));
        return sum;
#else
        return sum + words * others;
#endif
    }
    FASTRES_ALWAYS Vec<float> multiply_add(Vec<float> sum, Vec<float> words, const float* word) {
        return multiply_add(sum, words, broadcast(*word));
    }
    FASTRES_ALWAYS void multiply_add_memory(Vec<float>& sum, Vec<float> words, const float* word) {
#if defined(__AVX512F__) && !defined(FASTRES_EMULATE_AVX512)
        asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(words), "m"(*word));
#else
        sum = multiply_add(sum, words, word);
#endif
    }
    // As many weights as fill the lanes, in order.
    template <class T>
    FASTRES_ALWAYS Vec<float> load_weights(const T* weights) {
        return load(weights);
    }
    template <class T, class Lane>
    FASTRES_ALWAYS Lane pair(Lane first, Lane) {
        return rounded_to<T>(first);
    }
};

#if defined(__AVX512BF16__)
// A word is two bf16, the first in the lower half.
struct PairWords {
    static constexpr int pack = 2;

    FASTRES_ALWAYS Vec<float> multiply_add(Vec<float> sum, Vec<float> words, Vec<float> others) {
        return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                             reinterpret_cast<__m512bh>(words),
                                                             reinterpret_cast<__m512bh>(others)));
    }
    FASTRES_ALWAYS Vec<float> multiply_add(Vec<float> sum, Vec<float> words, const float* word) {
        return multiply_add(sum, words, broadcast(*word));
    }
    FASTRES_ALWAYS void multiply_add_memory(Vec<float>& sum, Vec<float> words, const float* word) {
#if defined(FASTRES_EMULATE_AVX512)
        sum = multiply_add(sum, words, word);
#else
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(words), "m"(*word));
#endif
    }
    template <class T>
    FASTRES_ALWAYS Vec<float> load_weights(const T* weights) {
        return reinterpret_cast<Vec<float>>(round_pair(load(weights), load(weights + kLanes<float>)));
    }
    // Rounded to bf16.
    template <class T>
    FASTRES_ALWAYS Vec<float> pair(Vec<float> first, Vec<float> second) {
        return alternate(reinterpret_cast<__m512i>(round_pair(first, second)));
    }
    // Values as they are stored; null stands for zeros.
    FASTRES_ALWAYS Vec<float> pair_of(const bf16* first, const bf16* second) {
        const auto values = [](const bf16* p) FASTRES_INLINE_BODY {
            return p ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_setzero_si256();
        };
        return alternate(_mm512_inserti64x4(_mm512_castsi256_si512(values(first)), values(second), 1));
    }
    template <class T>
    FASTRES_ALWAYS float pair(float first, float second) {
        return bits_to_float(float_to_bits(rounded_to<bf16>(first)) >> 16 |
                             float_to_bits(rounded_to<bf16>(second)));
    }

  private:
    FASTRES_ALWAYS Vec<float> alternate(__m512i halves) {
        const U16Pair alternating = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return reinterpret_cast<Vec<float>>(
            _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(alternating), halves));
    }
};
#endif

}  // namespace fastres::cpu::FASTRES_ISA
