// Batch normalisation's algebra, in the one place where it is written, for the CPU and for CUDA.
//
// All quantities are per channel; M is the number of elements of a channel, N*H*W.
//     z  = act((y - mean) * scale + shift [+ residual])       scale = gamma * rstd,  shift = beta
//     g  = dz * [z > 0]
//     dy = scale * (g - sum(g)/M - (y - mean) * rstd * dgamma/M)
// y is centred before it is scaled. The textbook form y*a + b with b = beta - mean*a loses |mean|/std
// digits to cancellation; the subtraction costs one instruction in loops that wait for memory. Reference:
// Ioffe and Szegedy 2015 (arXiv:1502.03167), section 3; Chan, Golub and LeVeque 1979 for the merge.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

#if defined(__CUDACC__)
#define FASTRES_INLINE __host__ __device__ __forceinline__
#else
// Internal linkage: the same header is compiled for several instruction sets, and the linker must not mix
// them.
#define FASTRES_INLINE static inline __attribute__((always_inline))
#endif

namespace fastres::bn_math {

// (count, mean, sum of squared deviations from the mean) of a set of values.
template <class Real>
struct Moments {
    Real count, mean, m2;
};

template <class Real>
FASTRES_INLINE Moments<Real> merge(Moments<Real> a, Moments<Real> b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const Real count = a.count + b.count;
    const Real delta = b.mean - a.mean;
    const Real share = b.count / count;
    // An infinite mean stays infinite (and its m2 is NaN), as in a plain sum.
    if (delta - delta != 0) return {count, a.mean + b.mean, a.m2 + b.m2};
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// From sums of (y - shift) and (y - shift)^2 over count > 0 values. Accurate when shift lies within a few
// standard deviations of the mean, which the callers see to.
template <class Real>
FASTRES_INLINE Moments<Real> from_shifted_sums(Real count, Real shift, Real sum, Real sum_of_squares) {
    const Real offset = sum / count;
    const Real m2 = sum_of_squares - sum * offset;
    return {count, shift + offset, m2 < 0 ? Real(0) : m2};
}

template <class Real>
FASTRES_INLINE Real reciprocal_std(Real variance, Real eps) {
    return Real(1) / std::sqrt(variance + eps);
}

// running <- (1 - momentum) * running + momentum * batch
template <class Real>
FASTRES_INLINE Real running_update(Real running, Real batch, Real momentum) {
    return (Real(1) - momentum) * running + momentum * batch;
}

// The variance that goes into running_var: Bessel's correction, as in PyTorch.
template <class Real>
FASTRES_INLINE Real unbiased_variance(Moments<Real> moments) {
    return moments.m2 / (moments.count - Real(1));
}

// dy = scale * (g - mean_grad - (y - mean) * slope)
template <class Real>
struct BackwardCoefficients {
    Real scale, mean_grad, slope, dgamma, dbeta;
};

// sum_grad = sum(g), dot = sum(g * (y - mean)). In evaluation mean and rstd are constants and dy = scale *
// g.
template <class Real>
FASTRES_INLINE BackwardCoefficients<Real> backward_coefficients(Real gamma, Real rstd, Real sum_grad,
                                                                Real dot, Real count, bool training) {
    const Real dgamma = dot * rstd;
    if (!training) return {gamma * rstd, Real(0), Real(0), dgamma, sum_grad};
    return {gamma * rstd, sum_grad / count, dgamma * rstd / count, dgamma, sum_grad};
}

// The largest value that rounds to zero when stored. What the forward pass stored as zero was not passed on
// by ReLU, so a mask recomputed in the backward pass calls it zero as well: half of the smallest subnormal
// (the tie rounds to even, that is to zero).
FASTRES_INLINE constexpr float largest_stored_as_zero(Dtype dtype) {
    return dtype == Dtype::bf16 ? 0x1p-134f : dtype == Dtype::f16 ? 0x1p-25f : 0.0f;
}

}  // namespace fastres::bn_math
