// Reading and writing one value of a ChannelVector as double. Per-channel work is small: clarity over
// speed.
#pragma once

#define FASTRES_ISA scalar
#include "core/batch_norm.h"
#include "cpu/vec.h"

namespace fastres::cpu {

inline double read(const ChannelVector& vector, int64_t channel, double if_null) {
    if (!vector) return if_null;
    switch (vector.dtype) {
        case Dtype::f32:
            return static_cast<const float*>(vector.data)[channel];
        case Dtype::f64:
            return static_cast<const double*>(vector.data)[channel];
        case Dtype::bf16:
            return scalar::to_real(static_cast<const scalar::bf16*>(vector.data)[channel]);
        case Dtype::f16:
            return scalar::to_real(static_cast<const scalar::f16*>(vector.data)[channel]);
    }
    return if_null;
}

inline void write(const ChannelVector& vector, int64_t channel, double value) {
    const float narrow = static_cast<float>(value);
    switch (vector.dtype) {
        case Dtype::f32:
            static_cast<float*>(vector.data)[channel] = narrow;
            break;
        case Dtype::f64:
            static_cast<double*>(vector.data)[channel] = value;
            break;
        case Dtype::bf16:
            scalar::from_real(narrow, static_cast<scalar::bf16*>(vector.data)[channel]);
            break;
        case Dtype::f16:
            scalar::from_real(narrow, static_cast<scalar::f16*>(vector.data)[channel]);
            break;
    }
}

}  // namespace fastres::cpu
