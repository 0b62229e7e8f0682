// The element types of activations and parameters, as storage types that need no framework.
//
// bf16 and f16 are storage only: every kernel widens them to float where it loads and rounds to nearest
// even where it stores, as PyTorch does.
#pragma once

#include <cstdint>

namespace fastres {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
inline constexpr int kDtypes = 4;

constexpr const char* name(Dtype dtype) {
    switch (dtype) {
        case Dtype::f32:
            return "float32";
        case Dtype::bf16:
            return "bfloat16";
        case Dtype::f16:
            return "float16";
        case Dtype::f64:
            return "float64";
    }
    return "?";
}

constexpr int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::f32:
            return 4;
        case Dtype::bf16:
            return 2;
        case Dtype::f16:
            return 2;
        case Dtype::f64:
            return 8;
    }
    return 0;
}

// Statistics, coefficients and saved tensors: float for all but f64.
constexpr Dtype accumulation_dtype(Dtype dtype) {
    return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
}

}  // namespace fastres
