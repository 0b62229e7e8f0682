// Reading and writing one value of a ChannelVector, of whatever dtype; once a channel, so a switch costs
// nothing.
#pragma once

#include "core/batch_norm.h"
#include "cuda/storage.cuh"

namespace fastres::cuda {

__device__ __forceinline__ float read(const ChannelVector& vector, int64_t index, float if_null) {
    if (vector.data == nullptr) return if_null;
    switch (vector.dtype) {
        case Dtype::bf16:
            return widen(static_cast<const __nv_bfloat16*>(vector.data)[index]);
        case Dtype::f16:
            return widen(static_cast<const __half*>(vector.data)[index]);
        default:
            return static_cast<const float*>(vector.data)[index];
    }
}

__device__ __forceinline__ void write(const ChannelVector& vector, int64_t index, float value) {
    switch (vector.dtype) {
        case Dtype::bf16:
            return narrow(value, static_cast<__nv_bfloat16*>(vector.data)[index]);
        case Dtype::f16:
            return narrow(value, static_cast<__half*>(vector.data)[index]);
        default:
            return narrow(value, static_cast<float*>(vector.data)[index]);
    }
}

// Throws std::invalid_argument for a dtype that read() and write() do not know.
inline void check_dtype(const ChannelVector& vector, const char* argument) {
    if (vector && vector.dtype == Dtype::f64)
        throw std::invalid_argument(
            "fastres: " + std::string(argument) +
            " is float64 under CUDA activations, expected float32, bfloat16 or float16");
}

}  // namespace fastres::cuda
