// The host meaning of AVX-512, so that the tests run its units on a processor with AVX2 alone. What the
// kernels say in vectors of the language the compiler cuts into halves by itself; here are the intrinsics
// that they call. Ours hide the compiler's of the same names, as they are found first from within a unit's
// namespace.
//
// Values are those of the instructions, bit by bit; a streaming store to an address that is not aligned
// ends the process, as on the processor.
//
// Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: VCVTNEPS2BF16,
// VCVTNE2PS2BF16, VDPBF16PS, VMAXPS, VPERMT2W.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// From here on the sources take the compiler for one that was told to use AVX-512.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#if defined(FASTRES_EMULATE_AVX512_BF16)
#define __AVX512BF16__ 1
#endif

namespace fastres::cpu::FASTRES_ISA {
namespace emulated {

typedef float F32 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef int64_t I64 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint16_t HalfU16 __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class To, class From>
inline __attribute__((always_inline)) To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return reinterpret_cast<To>(from);
}

// A bit for each lane, and all bits of a lane for each bit.
template <class Lanes>
inline __attribute__((always_inline)) uint16_t mask_of(Lanes lanes) {
    constexpr int count = sizeof lanes / sizeof lanes[0];
    unsigned mask = 0;
    for (int i = 0; i < count; ++i) mask |= static_cast<unsigned>(lanes[i] & 1) << i;
    return static_cast<uint16_t>(mask);
}
inline __attribute__((always_inline)) I32 lanes_of_mask(unsigned mask) {
    const I32 bits = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return ((I32{} + static_cast<int32_t>(mask)) & bits) != 0;
}

template <class Vector>
inline __attribute__((always_inline)) Vector half(__m512i v, int which) {
    Vector halves[2];
    memcpy(halves, &v, sizeof v);
    return halves[which];
}
template <class Vector>
inline __attribute__((always_inline)) __m512 join(Vector low, Vector high) {
    const Vector halves[2] = {low, high};
    __m512 v;
    memcpy(&v, halves, sizeof v);
    return v;
}

inline void store_aligned(void* p, const void* v, std::size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        std::fprintf(stderr, "AVX-512 emulator: a streaming store of %zu bytes is not aligned\n", bytes);
        std::abort();
    }
    memcpy(p, v, bytes);
}

// Subnormal numbers become zeros of their sign.
inline __attribute__((always_inline)) F32 flushed(F32 v) {
    const U32 bits = bits_as<U32>(v);
    return bits_as<F32>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}
// In the lower half of each lane.
inline __attribute__((always_inline)) U32 rounded_to_bf16(__m512 v) {
    const F32 value = bits_as<F32>(v);
    const U32 bits = bits_as<U32>(flushed(value));
    const U32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value != value ? (bits_as<U32>(value) >> 16 | 0x40) : rounded;
}
inline __attribute__((always_inline)) F32 fused(F32 a, F32 b, F32 addend) {
    const __m512i x = bits_as<__m512i>(a), y = bits_as<__m512i>(b), z = bits_as<__m512i>(addend);
    return bits_as<F32>(join(_mm256_fmadd_ps(half<__m256>(x, 0), half<__m256>(y, 0), half<__m256>(z, 0)),
                             _mm256_fmadd_ps(half<__m256>(x, 1), half<__m256>(y, 1), half<__m256>(z, 1))));
}

// The odd products before the even ones; subnormal numbers are zero. Not inlined: a tile has a hundred, and
// the compiler would take minutes.
static __attribute__((noinline, unused)) void add_products(__m512& sum, const __m512bh& a,
                                                           const __m512bh& b) {
    const U32 x = bits_as<U32>(a), y = bits_as<U32>(b);
    const F32 odd_x = flushed(bits_as<F32>(x & 0xffff0000u)), even_x = flushed(bits_as<F32>(x << 16));
    const F32 odd_y = flushed(bits_as<F32>(y & 0xffff0000u)), even_y = flushed(bits_as<F32>(y << 16));
    const F32 half_way = flushed(fused(odd_x, odd_y, flushed(bits_as<F32>(sum))));
    sum = bits_as<__m512>(flushed(fused(even_x, even_y, half_way)));
}

}  // namespace emulated

#define FASTRES_HIDING static inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------------------
// loads, stores

FASTRES_HIDING __m512i _mm512_loadu_si512(const void* p) {
    __m512i v;
    memcpy(&v, p, sizeof v);
    return v;
}
FASTRES_HIDING void _mm512_storeu_si512(void* p, __m512i v) {
    memcpy(p, &v, sizeof v);
}
FASTRES_HIDING void _mm512_stream_si512(__m512i* p, __m512i v) {
    emulated::store_aligned(p, &v, sizeof v);
}
FASTRES_HIDING void _mm512_stream_ps(float* p, __m512 v) {
    emulated::store_aligned(p, &v, sizeof v);
}
FASTRES_HIDING void _mm512_mask_storeu_ps(float* p, __mmask16 mask, __m512 v) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) p[i] = v[i];
}

// ---------------------------------------------------------------------------------------------------------
// floats

// Not by a sum with zeros, which would change a signalling NaN: the value may be a pair of bf16.
FASTRES_HIDING __m512 _mm512_set1_ps(float value) {
    return emulated::join(_mm256_set1_ps(value), _mm256_set1_ps(value));
}
// The second operand where one is NaN, or both are zeros.
FASTRES_HIDING __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return a > b ? a : b;
}
FASTRES_HIDING __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    switch (predicate) {
        case _CMP_GT_OQ:
            return emulated::mask_of(a > b);
        case _CMP_UNORD_Q:
            return emulated::mask_of((a != a) | (b != b));
        default:
            std::abort();  // no kernel asks for another one
    }
}
FASTRES_HIDING __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 v) {
    return emulated::lanes_of_mask(mask) ? v : otherwise;
}
FASTRES_HIDING __m512 _mm512_mask_add_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
    return emulated::lanes_of_mask(mask) ? a + b : otherwise;
}
FASTRES_HIDING __m512 _mm512_permutex2var_ps(__m512 a, __m512i indices, __m512 b) {
    return __builtin_shuffle(a, b, emulated::bits_as<emulated::I32>(indices));
}
FASTRES_HIDING __m256 _mm512_castps512_ps256(__m512 v) {
    return emulated::half<__m256>(emulated::bits_as<__m512i>(v), 0);
}
FASTRES_HIDING __m256 _mm512_extractf32x8_ps(__m512 v, int which) {
    return emulated::half<__m256>(emulated::bits_as<__m512i>(v), which);
}
FASTRES_HIDING __m512d _mm512_cvtps_pd(__m256 v) {
    return __builtin_convertvector(v, __m512d);
}
FASTRES_HIDING double _mm512_reduce_add_pd(__m512d v) {
    double sums[8];
    memcpy(sums, &v, sizeof sums);
    for (int width = 4; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
}
FASTRES_HIDING __m512 _mm512_cvtph_ps(__m256i v) {
    return emulated::join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                          _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
FASTRES_HIDING __m256i _mm512_cvtps_ph(__m512 v, int) {
    return _mm256_set_m128i(_mm256_cvtps_ph(_mm512_extractf32x8_ps(v, 1), 0),
                            _mm256_cvtps_ph(_mm512_castps512_ps256(v), 0));
}

// ---------------------------------------------------------------------------------------------------------
// integers

FASTRES_HIDING __m512i _mm512_set1_epi32(int value) {
    return emulated::bits_as<__m512i>(emulated::I32{} + value);
}
FASTRES_HIDING __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return emulated::bits_as<__m512i>(emulated::bits_as<emulated::U32>(a) +
                                      emulated::bits_as<emulated::U32>(b));
}
FASTRES_HIDING __m512i _mm512_mask_add_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
    return emulated::bits_as<__m512i>(emulated::lanes_of_mask(mask)
                                          ? emulated::bits_as<emulated::U32>(_mm512_add_epi32(a, b))
                                          : emulated::bits_as<emulated::U32>(otherwise));
}
FASTRES_HIDING __m512i _mm512_slli_epi32(__m512i v, unsigned bits) {
    return emulated::bits_as<__m512i>(emulated::bits_as<emulated::U32>(v) << bits);
}
FASTRES_HIDING __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
    return emulated::mask_of(emulated::bits_as<emulated::I32>(a & b) != 0);
}
FASTRES_HIDING __mmask8 _mm512_cmpneq_epi64_mask(__m512i a, __m512i b) {
    return static_cast<__mmask8>(
        emulated::mask_of(emulated::bits_as<emulated::I64>(a) != emulated::bits_as<emulated::I64>(b)));
}
FASTRES_HIDING __m512i _mm512_cvtepu16_epi32(__m256i v) {
    return emulated::bits_as<__m512i>(
        __builtin_convertvector(reinterpret_cast<emulated::HalfU16>(v), emulated::U32));
}
FASTRES_HIDING __m512i _mm512_permutexvar_epi16(__m512i indices, __m512i v) {
    return emulated::bits_as<__m512i>(
        __builtin_shuffle(emulated::bits_as<emulated::U16>(v), emulated::bits_as<emulated::U16>(indices)));
}
FASTRES_HIDING __m512i _mm512_permutex2var_epi16(__m512i a, __m512i indices, __m512i b) {
    return emulated::bits_as<__m512i>(__builtin_shuffle(emulated::bits_as<emulated::U16>(a),
                                                        emulated::bits_as<emulated::U16>(b),
                                                        emulated::bits_as<emulated::U16>(indices)));
}
FASTRES_HIDING __m256i _mm512_castsi512_si256(__m512i v) {
    return emulated::half<__m256i>(v, 0);
}
FASTRES_HIDING __m256i _mm512_extracti64x4_epi64(__m512i v, int which) {
    return emulated::half<__m256i>(v, which);
}
FASTRES_HIDING __m512i _mm512_castsi256_si512(__m256i v) {
    return emulated::bits_as<__m512i>(emulated::join(v, v));
}
FASTRES_HIDING __m512i _mm512_inserti64x4(__m512i v, __m256i half, int which) {
    const __m256i other = emulated::half<__m256i>(v, 1 - which);
    return emulated::bits_as<__m512i>(which ? emulated::join(other, half) : emulated::join(half, other));
}
FASTRES_HIDING __m128i _mm_mask_mov_epi8(__m128i otherwise, __mmask16 mask, __m128i v) {
    emulated::Bytes taken = reinterpret_cast<emulated::Bytes>(otherwise);
    const emulated::Bytes values = reinterpret_cast<emulated::Bytes>(v);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) taken[i] = values[i];
    return reinterpret_cast<__m128i>(taken);
}
FASTRES_HIDING __mmask16 _mm_cmpeq_epi8_mask(__m128i a, __m128i b) {
    return static_cast<__mmask16>(_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)));
}

// ---------------------------------------------------------------------------------------------------------
// bf16

#if defined(__AVX512BF16__)
FASTRES_HIDING __m256i _mm512_cvtneps_pbh(__m512 v) {
    return reinterpret_cast<__m256i>(
        __builtin_convertvector(emulated::rounded_to_bf16(v), emulated::HalfU16));
}
// `low` fills the lower half.
FASTRES_HIDING __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return reinterpret_cast<__m512bh>(emulated::join(_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)));
}
FASTRES_HIDING __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    emulated::add_products(sum, a, b);
    return sum;
}
#endif

#undef FASTRES_HIDING

}  // namespace fastres::cpu::FASTRES_ISA
