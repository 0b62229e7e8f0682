// The order in which a piece's elements are visited, shared by all of its loops.
//
// A body handles `unroll` lanes at offset, offset + step, ...: neighbouring rows of one channel vector
// where the piece is channels-last (coefficients and sums are touched once for all of them), or
// neighbouring vectors of a plane.
#pragma once

#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

template <class Lane_, int unroll_>
struct Step {
    using Lane = Lane_;
    static constexpr int unroll = unroll_;
};

struct True {
    static constexpr bool value = true;
};
struct False {
    static constexpr bool value = false;
};

struct Rows {
    static constexpr bool is_plane = false;
    // body(Step, offset of the first lane, distance to the next, channel)
    template <class Real, int unroll, class Body>
    FASTRES_ALWAYS void sweep(int64_t rows, int64_t row_stride, int64_t channels, const Body& body) {
        int64_t r = 0;
        for (; r + unroll <= rows; r += unroll) sweep_rows<Real, unroll>(r, row_stride, channels, body);
        for (; r < rows; ++r) sweep_rows<Real, 1>(r, row_stride, channels, body);
    }
    template <class Lane, class Real>
    FASTRES_ALWAYS Lane coefficient(const Real* per_channel, int64_t channel) {
        return load_as<Lane>(per_channel + channel);
    }

  private:
    template <class Real, int unroll, class Body>
    FASTRES_ALWAYS void sweep_rows(int64_t r, int64_t row_stride, int64_t channels, const Body& body) {
        int64_t c = 0;
        for (; c + kLanes<Real> <= channels; c += kLanes<Real>)
            body(Step<Vec<Real>, unroll>{}, r * row_stride + c, row_stride, c);
        for (; c < channels; ++c) body(Step<Real, unroll>{}, r * row_stride + c, row_stride, c);
    }
};

struct Plane {
    static constexpr bool is_plane = true;
    template <class Real, int unroll, class Body>
    FASTRES_ALWAYS void sweep(int64_t pixels, int64_t, int64_t, const Body& body) {
        constexpr int64_t lanes = kLanes<Real>;
        int64_t p = 0;
        for (; p + unroll * lanes <= pixels; p += unroll * lanes)
            body(Step<Vec<Real>, unroll>{}, p, lanes, int64_t{0});
        for (; p + lanes <= pixels; p += lanes) body(Step<Vec<Real>, 1>{}, p, lanes, int64_t{0});
        for (; p < pixels; ++p) body(Step<Real, 1>{}, p, int64_t{1}, int64_t{0});
    }
    template <class Lane, class Real>
    FASTRES_ALWAYS Lane coefficient(const Real* per_channel, int64_t) {
        return Lane{} + *per_channel;
    }
};

}  // namespace fastres::cpu::FASTRES_ISA
