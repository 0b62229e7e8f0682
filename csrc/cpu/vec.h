// Vectors of the width that this translation unit is compiled for, and their loads and stores from storage
// types.
//
// Arithmetic is the compiler's (GCC and Clang vector extensions): one source gives SSE2 or NEON, AVX2 and
// AVX-512. Only what the language has no word for is intrinsics: half-precision conversion and streaming
// stores.
//
// FASTRES_ISA names the unit (scalar, avx2, avx512, ...) and its namespace, so that the linker never mixes
// code that was compiled for different instruction sets; for the same reason nothing here uses std::
// templates.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#ifndef FASTRES_ISA
#error "define FASTRES_ISA before including vec.h"
#endif

#if defined(FASTRES_EMULATE_AVX512)
#include "emu/avx512.h"
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastres::cpu::FASTRES_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Storage type -> its enumerator and the type that it is computed in.
template <class T>
struct Storage;
template <>
struct Storage<float> {
    using Real = float;
    static constexpr Dtype dtype = Dtype::f32;
};
template <>
struct Storage<bf16> {
    using Real = float;
    static constexpr Dtype dtype = Dtype::bf16;
};
template <>
struct Storage<f16> {
    using Real = float;
    static constexpr Dtype dtype = Dtype::f16;
};
template <>
struct Storage<double> {
    using Real = double;
    static constexpr Dtype dtype = Dtype::f64;
};
template <class T>
using RealOf = typename Storage<T>::Real;

template <class E, int lanes>
struct VectorOf {
    typedef E type __attribute__((vector_size(sizeof(E) * lanes)));
};
template <class Real>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));
template <class Real>
using Vec = typename VectorOf<Real, kLanes<Real>>::type;
// As many doubles as Vec<Real> has lanes: where sums are kept.
template <class Real>
using WideVec = typename VectorOf<double, kLanes<Real>>::type;

#define FASTRES_ALWAYS static inline __attribute__((always_inline))
#define FASTRES_INLINE_BODY __attribute__((always_inline))  // of a lambda

// ---------------------------------------------------------------------------------------------------------
// one value

FASTRES_ALWAYS float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
FASTRES_ALWAYS uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

FASTRES_ALWAYS float to_real(float value) {
    return value;
}
FASTRES_ALWAYS double to_real(double value) {
    return value;
}
FASTRES_ALWAYS float to_real(bf16 value) {
    return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
#if defined(__F16C__)
FASTRES_ALWAYS float to_real(f16 value) {
    return _cvtsh_ss(value.bits);
}
#else  // long, and not inlined: this is for correctness alone
__attribute__((noinline)) static float to_real(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Scaling by 2^112 moves half's exponent range to float's and normalises subnormals.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
#endif

FASTRES_ALWAYS void from_real(float value, float& out) {
    out = value;
}
FASTRES_ALWAYS void from_real(double value, double& out) {
    out = value;
}
FASTRES_ALWAYS void from_real(float value, bf16& out) {
    const uint32_t bits = float_to_bits(value);
    const bool nan = value != value;
    out.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#if defined(__F16C__)
FASTRES_ALWAYS void from_real(float value, f16& out) {
    out.bits = _cvtss_sh(value, 0);
}
#else
__attribute__((noinline)) static void from_real(float value, f16& out) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    uint16_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 leaves the subnormal's bits at the end
        half = static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
    } else {
        half = static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
    }
    out.bits = sign | half;
}
#endif

// ---------------------------------------------------------------------------------------------------------
// a vector

using U16 = VectorOf<uint16_t, kLanes<float>>::type;
using U32 = VectorOf<uint32_t, kLanes<float>>::type;
using I32 = VectorOf<int32_t, kLanes<float>>::type;
using U16Pair = VectorOf<uint16_t, 2 * kLanes<float>>::type;

FASTRES_ALWAYS Vec<float> load(const float* p) {
    Vec<float> v;
    memcpy(&v, p, sizeof v);
    return v;
}
FASTRES_ALWAYS Vec<double> load(const double* p) {
    Vec<double> v;
    memcpy(&v, p, sizeof v);
    return v;
}
// Left to itself, GCC widens 16 bits in quarters and puts them together again.
FASTRES_ALWAYS Vec<float> load(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(wide, 16));
#else
    U16 half;
    memcpy(&half, p, sizeof half);
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, U32) << 16);
#endif
}
FASTRES_ALWAYS Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec<float>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<Vec<float>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_real(p[i]);
    return v;
#endif
}

// The upper half of each lane becomes the nearest bf16, ties to even, for all but NaN. The lower half is
// left over.
FASTRES_ALWAYS U32 round_to_bf16(Vec<float> v) {
    const U32 bits = reinterpret_cast<U32>(v);
#if defined(__AVX512F__)
    const __m512i in = reinterpret_cast<__m512i>(bits);
    const __mmask16 odd = _mm512_test_epi32_mask(in, _mm512_set1_epi32(1 << 16));
    const __m512i up = _mm512_add_epi32(in, _mm512_set1_epi32(0x7fff));
    return reinterpret_cast<U32>(_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1)));
#else
    return bits + 0x7fff + (bits >> 16 & 1);
#endif
}
FASTRES_ALWAYS U32 bf16_bits(Vec<float> v) {
    const I32 nan = v != v;
    return nan ? (U32{} + 0x7fc0) : round_to_bf16(v) >> 16;
}

// Whether the unit has stores past the caches of T.
#if defined(__AVX2__)
template <class T>
inline constexpr bool kStreams = sizeof(T) <= sizeof(float);
#else
template <class T>
inline constexpr bool kStreams = false;
#endif

template <bool stream>
FASTRES_ALWAYS void store(float* p, Vec<float> v) {
#if defined(__AVX512F__)
    if (stream) return _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    if (stream) return _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#endif
    memcpy(p, &v, sizeof v);
}
template <bool stream>
FASTRES_ALWAYS void store(double* p, Vec<double> v) {
    memcpy(p, &v, sizeof v);
}
// Two bytes a lane: half a vector register.
template <bool stream>
FASTRES_ALWAYS void store_half_width(void* p, U16 half) {
#if defined(__AVX512F__)
    if (stream) return _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(half));
#elif defined(__AVX2__)
    if (stream) return _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(half));
#endif
    memcpy(p, &half, sizeof half);
}
template <bool stream>
FASTRES_ALWAYS void store(bf16* p, Vec<float> v) {
    store_half_width<stream>(p, __builtin_convertvector(bf16_bits(v), U16));
}
template <bool stream>
FASTRES_ALWAYS void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
    store_half_width<stream>(p, reinterpret_cast<U16>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0)));
#elif defined(__F16C__)
    store_half_width<stream>(p, reinterpret_cast<U16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0)));
#else
    for (int i = 0; i < kLanes<float>; ++i) from_real(v[i], p[i]);
#endif
}

// Two neighbouring vectors. bf16 packs both into one store; that NaN needs other bits is checked for both
// at once.
template <bool stream, class T, class Lane>
FASTRES_ALWAYS void store_pair(T* p, Lane a, Lane b) {
    store<stream>(p, a);
    store<stream>(p + sizeof(Lane) / sizeof(RealOf<T>), b);
}
#if defined(__AVX512F__)
template <bool stream>
FASTRES_ALWAYS void store_pair(bf16* p, Vec<float> a, Vec<float> b) {
    const __m512 first = reinterpret_cast<__m512>(a), second = reinterpret_cast<__m512>(b);
    if (__builtin_expect(_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q), 0)) {
        store<stream>(p, a);
        store<stream>(p + kLanes<float>, b);
        return;
    }
    const U16Pair upper_halves = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i packed = _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(round_to_bf16(a)),
                                                     reinterpret_cast<__m512i>(upper_halves),
                                                     reinterpret_cast<__m512i>(round_to_bf16(b)));
    if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), packed);
    _mm512_storeu_si512(p, packed);
}
#elif defined(__AVX2__)
template <bool stream>
FASTRES_ALWAYS void store_pair(bf16* p, Vec<float> a, Vec<float> b) {
    const __m256 first = reinterpret_cast<__m256>(a), second = reinterpret_cast<__m256>(b);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(first, second, _CMP_UNORD_Q)), 0)) {
        store<stream>(p, a);
        store<stream>(p + kLanes<float>, b);
        return;
    }
    const __m256i halves = _mm256_packus_epi32(reinterpret_cast<__m256i>(round_to_bf16(a) >> 16),
                                               reinterpret_cast<__m256i>(round_to_bf16(b) >> 16));
    const __m256i packed = _mm256_permute4x64_epi64(halves, 0b11011000);
    if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
#endif

// Streaming stores are not ordered with later ones; a fence at the end of a task makes them visible.
FASTRES_ALWAYS void fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// The larger one; where v is NaN, v.
template <class Lane, class Real>
FASTRES_ALWAYS Lane not_below(Real floor, Lane v) {
    const Lane least = Lane{} + floor;
    return v < least ? least : v;
}
#if defined(__AVX512F__)
FASTRES_ALWAYS Vec<float> not_below(float floor, Vec<float> v) {
    return reinterpret_cast<Vec<float>>(_mm512_max_ps(_mm512_set1_ps(floor), reinterpret_cast<__m512>(v)));
}
#elif defined(__AVX2__)
FASTRES_ALWAYS Vec<float> not_below(float floor, Vec<float> v) {
    return reinterpret_cast<Vec<float>>(_mm256_max_ps(_mm256_set1_ps(floor), reinterpret_cast<__m256>(v)));
}
#endif

// NaN and -0 pass, as in PyTorch.
template <class Lane>
FASTRES_ALWAYS Lane relu(Lane v) {
    return not_below(0.0f, v);
}

// ReLU's gradient. "Not above" is written so that NaN counts as above: PyTorch lets its gradient through.
template <class Lane, class Real>
FASTRES_ALWAYS Lane zero_where_not_above(Lane pre_activation, Real threshold, Lane grad) {
#if defined(__AVX512F__) && !defined(FASTRES_EMULATE_AVX512)
    // Selection and load must not become one masked load, which would wait for the comparison.
    asm("" : "+v"(grad));
#endif
    return pre_activation <= (Lane{} + threshold) ? Lane{} : grad;
}

#if defined(__AVX512F__)
FASTRES_ALWAYS double sum_of_lanes(Vec<double> v) {
    return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v));
}
FASTRES_ALWAYS double sum_of_lanes(Vec<float> v) {
    const __m512 lanes = reinterpret_cast<__m512>(v);
    return _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(lanes)) +
                                _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1)));
}
#else
template <class V>
FASTRES_ALWAYS double sum_of_lanes(V v) {
    double total = 0;
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof v[0]); ++i) total += v[i];
    return total;
}
#endif

FASTRES_ALWAYS double widen(float value) {
    return value;
}
FASTRES_ALWAYS double widen(double value) {
    return value;
}
FASTRES_ALWAYS WideVec<float> widen(Vec<float> v) {
    return __builtin_convertvector(v, WideVec<float>);
}
FASTRES_ALWAYS WideVec<double> widen(Vec<double> v) {
    return v;
}

// ---------------------------------------------------------------------------------------------------------
// A kernel's loop body is written once over a "lane type": Vec<Real> for the bulk and Real for the tail.

template <class Lane, class T>
FASTRES_ALWAYS Lane load_as(const T* p) {
    if constexpr (sizeof(Lane) == sizeof(RealOf<T>)) {
        return to_real(*p);
    } else {
        return load(p);
    }
}
template <bool stream, class T, class Lane>
FASTRES_ALWAYS void store_as(T* p, Lane v) {
    if constexpr (sizeof(Lane) == sizeof(RealOf<T>)) {
        from_real(v, *p);
    } else {
        store<stream>(p, v);
    }
}
template <class Lane, class Real>
FASTRES_ALWAYS void add_to(Real* p, Lane v) {
    Lane total;
    memcpy(&total, p, sizeof total);
    total += v;
    memcpy(p, &total, sizeof total);
}

}  // namespace fastres::cpu::FASTRES_ISA
