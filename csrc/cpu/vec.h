// Vectors of the width that this translation unit is compiled for, and their loads and stores from storage
// types.
//
// Arithmetic is the compiler's (GCC and Clang vector extensions): one source gives SSE2 or NEON, AVX2 and
// AVX-512. Only what the language has no word for is intrinsics: half-precision conversion and streaming
// stores.
//
// FASTRES_ISA names the unit (scalar, avx2, avx512) and its namespace, so that the linker never mixes code
// that was compiled for different instruction sets; for the same reason nothing here uses std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTRES_ISA
#error "define FASTRES_ISA before including vec.h"
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
FASTRES_ALWAYS float to_real(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Scaling by 2^112 moves half's exponent range to float's and normalises subnormals.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

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
FASTRES_ALWAYS void from_real(float value, f16& out) {
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

// ---------------------------------------------------------------------------------------------------------
// a vector

using U16 = VectorOf<uint16_t, kLanes<float>>::type;
using U32 = VectorOf<uint32_t, kLanes<float>>::type;
using I32 = VectorOf<int32_t, kLanes<float>>::type;

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
FASTRES_ALWAYS Vec<float> load(const bf16* p) {
    U16 half;
    memcpy(&half, p, sizeof half);
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, U32) << 16);
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

// Bits of each lane rounded to the nearest bf16, in the low half of the lane.
FASTRES_ALWAYS U32 round_to_bf16(Vec<float> v) {
    const U32 bits = reinterpret_cast<U32>(v);
    const U32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const I32 nan = v != v;
    return nan ? (U32{} + 0x7fc0) : rounded;
}

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
    store_half_width<stream>(p, __builtin_convertvector(round_to_bf16(v), U16));
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

// Streaming stores are not ordered with later ones; a fence at the end of a task makes them visible.
FASTRES_ALWAYS void fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

template <class Real>
FASTRES_ALWAYS Vec<Real> broadcast(Real value) {
    return Vec<Real>{} + value;
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

}  // namespace fastres::cpu::FASTRES_ISA
