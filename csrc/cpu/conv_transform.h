// The linear maps of Winograd's convolution F(2x2, 3x3) for the instruction set that the unit is compiled
// with: each is L x L^T for a small matrix x of vectors of channels.
//
// Reference: Lavin and Gray 2015 (arXiv:1509.09308), section 4.1.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

// B^T: four inputs, as they are multiplied.
struct InputMap {
    static constexpr int in = 4, out = 4;
    template <class Lane>
    FASTRES_ALWAYS void apply(const Lane (&d)[4], Lane (&v)[4]) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }
};

// G: the three weights.
struct WeightMap {
    static constexpr int in = 3, out = 4;
    template <class Lane>
    FASTRES_ALWAYS void apply(const Lane (&g)[3], Lane (&u)[4]) {
        const Lane outer = (g[0] + g[2]) * 0.5f, inner = g[1] * 0.5f;
        u[0] = g[0];
        u[1] = outer + inner;
        u[2] = outer - inner;
        u[3] = g[2];
    }
};

// A^T: two outputs from the sums of products.
struct OutputMap {
    static constexpr int in = 4, out = 2;
    template <class Lane>
    FASTRES_ALWAYS void apply(const Lane (&m)[4], Lane (&y)[2]) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] - m[3];
    }
};

// A: from the gradient of two outputs to that of the sums.
struct OutputGradMap {
    static constexpr int in = 2, out = 4;
    template <class Lane>
    FASTRES_ALWAYS void apply(const Lane (&y)[2], Lane (&m)[4]) {
        m[0] = y[0];
        m[1] = y[0] + y[1];
        m[2] = y[0] - y[1];
        m[3] = -y[1];
    }
};

// G^T: the gradient of the weights.
struct WeightGradMap {
    static constexpr int in = 4, out = 3;
    template <class Lane>
    FASTRES_ALWAYS void apply(const Lane (&u)[4], Lane (&g)[3]) {
        const Lane outer = (u[1] + u[2]) * 0.5f;
        g[0] = u[0] + outer;
        g[1] = (u[1] - u[2]) * 0.5f;
        g[2] = outer + u[3];
    }
};

FASTRES_ALWAYS void store_lane(float* p, float value) {
    *p = value;
}
FASTRES_ALWAYS void store_lane(float* p, Vec<float> value) {
    store<false>(p, value);
}

template <class Map, class Lane>
FASTRES_ALWAYS void transform_lane(const MatrixTransform& matrix, int64_t c) {
    Lane half[Map::out][Map::in];
#pragma GCC unroll 4
    for (int column = 0; column < Map::in; ++column) {
        Lane x[Map::in], y[Map::out];
#pragma GCC unroll 4
        for (int row = 0; row < Map::in; ++row)
            x[row] = load_as<Lane>(matrix.in + row * matrix.in_row + column * matrix.in_column + c);
        Map::apply(x, y);
#pragma GCC unroll 4
        for (int row = 0; row < Map::out; ++row) half[row][column] = y[row];
    }
#pragma GCC unroll 4
    for (int row = 0; row < Map::out; ++row) {
        Lane y[Map::out];
        Map::apply(half[row], y);
#pragma GCC unroll 4
        for (int column = 0; column < Map::out; ++column)
            store_lane(matrix.out + row * matrix.out_row + column * matrix.out_column + c, y[column]);
    }
}

template <class Map>
void transform(const MatrixTransform& matrix) {
    constexpr int lanes = kLanes<float>;
    int64_t c = 0;
    for (; c + lanes <= matrix.count; c += lanes) transform_lane<Map, Vec<float>>(matrix, c);
    for (; c < matrix.count; ++c) transform_lane<Map, float>(matrix, c);
}

}  // namespace fastres::cpu::FASTRES_ISA
