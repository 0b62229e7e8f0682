// The body of a translation unit: all loops, for the instruction set that it is compiled with.
#pragma once

#include "cpu/add_relu_loops.h"
#include "cpu/batch_norm_loops.h"

namespace fastres::cpu::FASTRES_ISA {

template <class T, class Order>
constexpr Kernels::Layout layout_of(void (*moments)(const MomentsPiece&)) {
    return {moments, apply<T, Order>, reduce<T, Order>, input_grad<T, Order>};
}

// Entries in the order of Dtype.
constexpr Kernels unit(const char* isa) {
    return {isa,
            {layout_of<float, Rows>(moments_rows<float>), layout_of<bf16, Rows>(moments_rows<bf16>),
             layout_of<f16, Rows>(moments_rows<f16>), layout_of<double, Rows>(moments_rows<double>)},
            {layout_of<float, Plane>(moments_plane<float>), layout_of<bf16, Plane>(moments_plane<bf16>),
             layout_of<f16, Plane>(moments_plane<f16>), layout_of<double, Plane>(moments_plane<double>)},
            {{add_relu<float>, add_relu_grad<float>},
             {add_relu<bf16>, add_relu_grad<bf16>},
             {add_relu<f16>, add_relu_grad<f16>},
             {add_relu<double>, add_relu_grad<double>}}};
}

}  // namespace fastres::cpu::FASTRES_ISA
