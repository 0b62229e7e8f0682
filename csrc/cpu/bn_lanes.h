// Batch normalisation of a lane, forward and backward: what the loops over rows and the convolutions' loads
// have in common. The coefficients are those of cpu/kernels.h.
#pragma once

#include "core/bn_math.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

template <class Lane>
FASTRES_ALWAYS Lane normalise(Lane input, Lane mean, Lane scale, Lane shift) {
    return (input - mean) * scale + shift;
}

// The gradient of the activation's input. T is how its output was stored.
template <class T, class Lane>
FASTRES_ALWAYS Lane mask_recomputed(Lane grad, Lane deviation, Lane scale, Lane shift) {
    constexpr RealOf<T> threshold = bn_math::largest_stored_as_zero(Storage<T>::dtype);
    return zero_where_not_above(deviation * scale + shift, threshold, grad);
}

// The gradient of the batch norm's input; `deviation` is input - mean.
template <class Lane>
FASTRES_ALWAYS Lane input_gradient(Lane masked_grad, Lane deviation, Lane scale, Lane mean_grad,
                                   Lane slope) {
    return scale * (masked_grad - mean_grad - deviation * slope);
}

}  // namespace fastres::cpu::FASTRES_ISA
