// What a translation unit makes: loops for the instruction set that it is compiled with.
#pragma once

#include "cpu/add_relu_loops.h"
#include "cpu/batch_norm_loops.h"
#include "cpu/conv_loops.h"
#include "cpu/max_pool_loops.h"

namespace fastres::cpu::FASTRES_ISA {

template <class T>
constexpr Kernels::Loops loops_of() {
    return {{shifted_sums<T, RowTiles>, apply<T, Rows>, reduce<T, Rows, RowTiles>, input_grad<T, Rows>},
            {shifted_sums<T, Plane>, apply<T, Plane>, reduce<T, Plane, Plane>, input_grad<T, Plane>},
            {add_relu<T>, add_relu_grad<T>},
            {max_pool<T>, max_pool_grad<T>}};
}

template <class Words, class T>
inline constexpr ConvKernels kConvKernels = conv_kernels<Words, T>();

// Null where vectors are so short that PyTorch's convolutions are the faster ones.
template <class Words, class T>
constexpr const ConvKernels* convolution_of() {
#if defined(__AVX2__)
    return &kConvKernels<Words, T>;
#else
    return nullptr;
#endif
}

// All of them. Entries in the order of Dtype.
constexpr Kernels unit(const char* isa) {
    return {isa,
            {loops_of<float>(), loops_of<bf16>(), loops_of<f16>(), loops_of<double>()},
            {convolution_of<FloatWords, float>(), convolution_of<FloatWords, bf16>(),
             convolution_of<FloatWords, f16>(), nullptr}};
}

}  // namespace fastres::cpu::FASTRES_ISA
