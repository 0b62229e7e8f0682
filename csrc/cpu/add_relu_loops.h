// The residual addition with its ReLU, and its gradient, over a dense run of elements.
#pragma once

#include "cpu/kernels.h"
#include "cpu/sweep.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

template <class T, bool stream>
FASTRES_ALWAYS void add_relu_loop(const AddReluPiece& piece) {
    const T* input = static_cast<const T*>(piece.input);
    const T* other = static_cast<const T*>(piece.other);
    T* output = static_cast<T*>(piece.output);
    Plane::sweep<RealOf<T>>(piece.numel, 1,
                            [&](auto step, int64_t offset, int64_t stride, int64_t) FASTRES_INLINE_BODY {
                                using S = decltype(step);
                                using Lane = typename S::Lane;
                                Lane z[S::unroll];
#pragma GCC unroll 4
                                for (int i = 0; i < S::unroll; ++i) {
                                    const int64_t at = offset + i * stride;
                                    z[i] = relu(load_as<Lane>(input + at) + load_as<Lane>(other + at));
                                }
                                store_lanes<Plane, stream>(output + offset, stride, z);
                            });
    if constexpr (stream) fence();
}

template <class T, bool stream>
FASTRES_ALWAYS void add_relu_grad_loop(const AddReluGradPiece& piece) {
    const T* grad = static_cast<const T*>(piece.grad);
    const T* output = static_cast<const T*>(piece.output);
    T* grad_input = static_cast<T*>(piece.grad_input);
    Plane::sweep<RealOf<T>>(piece.numel, 1,
                            [&](auto step, int64_t offset, int64_t stride, int64_t) FASTRES_INLINE_BODY {
                                using S = decltype(step);
                                using Lane = typename S::Lane;
                                Lane g[S::unroll];
#pragma GCC unroll 4
                                for (int i = 0; i < S::unroll; ++i) {
                                    const int64_t at = offset + i * stride;
                                    g[i] = zero_where_not_above(load_as<Lane>(output + at), RealOf<T>(0),
                                                                load_as<Lane>(grad + at));
                                }
                                store_lanes<Plane, stream>(grad_input + offset, stride, g);
                            });
    if constexpr (stream) fence();
}

template <class T>
void add_relu(const AddReluPiece& piece) {
    return piece.stream ? add_relu_loop<T, true>(piece) : add_relu_loop<T, false>(piece);
}

template <class T>
void add_relu_grad(const AddReluGradPiece& piece) {
    return piece.stream ? add_relu_grad_loop<T, true>(piece) : add_relu_grad_loop<T, false>(piece);
}

}  // namespace fastres::cpu::FASTRES_ISA
