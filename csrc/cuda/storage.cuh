// Storage types of activations, and their loads and stores: 16 bytes at a time, or one element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "cuda/ptx.cuh"

namespace fastres::cuda {

template <class T>
struct Storage;
template <>
struct Storage<float> {
    static constexpr Dtype dtype = Dtype::f32;
};
template <>
struct Storage<__nv_bfloat16> {
    static constexpr Dtype dtype = Dtype::bf16;
};
template <>
struct Storage<__half> {
    static constexpr Dtype dtype = Dtype::f16;
};

__device__ __forceinline__ float widen(float value) {
    return value;
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float widen(__half value) {
    return __half2float(value);
}

__device__ __forceinline__ void narrow(float value, float& out) {
    out = value;
}
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) {
    out = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void narrow(float value, __half& out) {
    out = __float2half_rn(value);
}

inline constexpr int kVectorBytes = 16;
template <class T>
inline constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(T));

// `width` neighbouring elements: a whole vector, or a single one.
template <class T, int width>
struct Pack {
    static_assert(width == 1 || width == kVectorWidth<T>);

    T value[width];

    __device__ __forceinline__ float operator[](int i) const { return widen(value[i]); }
    __device__ __forceinline__ void set(int i, float real) { narrow(real, value[i]); }

    __device__ __forceinline__ void load(const T* from) {
        if constexpr (width == 1) {
            value[0] = *from;
        } else {
            const uint4 raw = *reinterpret_cast<const uint4*>(from);
            memcpy(value, &raw, sizeof raw);
        }
    }
    // To memory, not to shared memory.
    __device__ __forceinline__ void store(T* to) const {
        if constexpr (width == 1) {
            *to = value[0];
        } else {
            uint4 raw;
            memcpy(&raw, value, sizeof raw);
            store_16_bytes(to, raw);
        }
    }
};

// Whether all pointers, null aside, can be read as vectors.
inline bool vector_aligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers)
        if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes != 0) return false;
    return true;
}

template <class T, int width_>
struct Access {
    using Element = T;
    static constexpr int width = width_;
};

// Calls body with a value of the storage type.
template <class Body>
auto with_element(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::f32:
            return body(float{});
        case Dtype::bf16:
            return body(__nv_bfloat16{});
        case Dtype::f16:
            return body(__half{});
        case Dtype::f64:
            break;
    }
    throw std::invalid_argument("fastres: no CUDA kernel takes " + std::string(name(dtype)) +
                                " activations, expected float32, bfloat16 or float16");
}

// Calls body(Access) for the storage type and, where `vectors`, the vector's width, else 1.
template <class Body>
void with_access(Dtype dtype, bool vectors, const Body& body) {
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        return vectors ? body(Access<T, kVectorWidth<T>>{}) : body(Access<T, 1>{});
    });
}

}  // namespace fastres::cuda
