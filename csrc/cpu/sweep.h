// The orders in which a piece's elements are visited, shared by all loops.
//
// A body handles `unroll` lanes at offset, offset + stride, ...; those of an order's Plain one handle one,
// which is slower, and a fraction of the code. Which order is fast is up to the
// prefetchers, which follow a stream that walks through memory front to back, or several streams that are a
// page apart; they lose several that share a page (sums over rows of 256 channels then take 2 to 3 times as
// long).
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

// What the lanes of a body are to each other.
enum class Lanes { neighbouring_channels, rows_of_a_channel, pixels_of_a_channel };

// Channels last, one row after the other.
template <int unroll_>
struct RowsBy {
    using Plain = RowsBy<1>;
    static constexpr Lanes lanes = Lanes::neighbouring_channels;
    static constexpr int unroll = unroll_;
    // body(Step, offset of the first lane, distance to the next, channel of the first)
    template <class Real, class Body>
    FASTRES_ALWAYS void sweep(int64_t rows, int64_t channels, const Body& body) {
        constexpr int64_t width = kLanes<Real>;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = r * channels;
            int64_t c = 0;
            if constexpr (unroll > 1)
                for (; c + unroll * width <= channels; c += unroll * width)
                    body(Step<Vec<Real>, unroll>{}, row + c, width, c);
            for (; c + width <= channels; c += width) body(Step<Vec<Real>, 1>{}, row + c, width, c);
            for (; c < channels; ++c) body(Step<Real, 1>{}, row + c, int64_t{1}, c);
        }
    }
    template <class Step, class T>
    FASTRES_ALWAYS void fetch(const T*, int64_t, int64_t, int64_t) {}
};

// Channels last, tiles of a few rows, a column of vectors at a time: sums and coefficients are touched once
// for all rows. The next tile is fetched meanwhile, front to back. For loops that store nothing: stores are
// not fetched.
template <int unroll_>
struct RowTilesBy {
    using Plain = RowTilesBy<1>;
    static constexpr Lanes lanes = Lanes::rows_of_a_channel;
    static constexpr int unroll = unroll_;
    template <class Real, class Body>
    FASTRES_ALWAYS void sweep(int64_t rows, int64_t channels, const Body& body) {
        int64_t r = 0;
        if constexpr (unroll > 1)
            for (; r + unroll <= rows; r += unroll) sweep_tile<Real, unroll>(r, channels, body);
        for (; r < rows; ++r) sweep_tile<Real, 1>(r, channels, body);
    }
    // A body's share of the next tile of an operand; the columns before c were the share of others.
    template <class Step, class T>
    FASTRES_ALWAYS void fetch(const T* operand, int64_t offset, int64_t stride, int64_t c) {
        if constexpr (unroll > 1 && Step::unroll == unroll) {
            constexpr int64_t line = 64,
                              bytes = unroll * kLanes<RealOf<T>> * static_cast<int64_t>(sizeof(T));
            const T* next = operand + offset - c + unroll * (stride + c);
#pragma GCC unroll 8
            for (int64_t byte = 0; byte < bytes; byte += line)
                __builtin_prefetch(reinterpret_cast<const char*>(next) + byte);
        }
    }

  private:
    template <class Real, int rows, class Body>
    FASTRES_ALWAYS void sweep_tile(int64_t r, int64_t channels, const Body& body) {
        int64_t c = 0;
        for (; c + kLanes<Real> <= channels; c += kLanes<Real>)
            body(Step<Vec<Real>, rows>{}, r * channels + c, channels, c);
        for (; c < channels; ++c) body(Step<Real, rows>{}, r * channels + c, channels, c);
    }
};

// A dense run of values of one channel, or without channels.
template <int unroll_>
struct PlaneBy {
    using Plain = PlaneBy<1>;
    static constexpr Lanes lanes = Lanes::pixels_of_a_channel;
    static constexpr int unroll = unroll_;
    template <class Real, class Body>
    FASTRES_ALWAYS void sweep(int64_t pixels, int64_t, const Body& body) {
        constexpr int64_t width = kLanes<Real>;
        int64_t p = 0;
        if constexpr (unroll > 1)
            for (; p + unroll * width <= pixels; p += unroll * width)
                body(Step<Vec<Real>, unroll>{}, p, width, int64_t{0});
        for (; p + width <= pixels; p += width) body(Step<Vec<Real>, 1>{}, p, width, int64_t{0});
        for (; p < pixels; ++p) body(Step<Real, 1>{}, p, int64_t{1}, int64_t{0});
    }
    template <class Step, class T>
    FASTRES_ALWAYS void fetch(const T*, int64_t, int64_t, int64_t) {}
};

using Rows = RowsBy<4>;
using RowTiles = RowTilesBy<4>;
using Plane = PlaneBy<4>;

// Lane i's coefficient.
template <class Order, class Lane, class Real>
FASTRES_ALWAYS Lane coefficient(const Real* per_channel, int64_t channel, [[maybe_unused]] int i) {
    if constexpr (Order::lanes == Lanes::pixels_of_a_channel) {
        return Lane{} + *per_channel;
    } else if constexpr (Order::lanes == Lanes::rows_of_a_channel) {
        return load_as<Lane>(per_channel + channel);
    } else {
        return load_as<Lane>(per_channel + channel + i * kLanes<Real>);
    }
}

// How often a piece is swept: once, or plane by plane.
template <class Order, class Piece>
FASTRES_ALWAYS int64_t sweeps(const Piece& piece) {
    return Order::lanes == Lanes::pixels_of_a_channel ? piece.channels : 1;
}

// Stores a body's results; neighbouring lanes in pairs.
template <class Order, bool stream, class T, class Lane, int unroll>
FASTRES_ALWAYS void store_lanes(T* p, int64_t stride, const Lane (&values)[unroll]) {
    if constexpr (unroll % 2 == 0 && Order::lanes != Lanes::rows_of_a_channel) {
#pragma GCC unroll 8
        for (int i = 0; i < unroll; i += 2) store_pair<stream>(p + i * stride, values[i], values[i + 1]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < unroll; ++i) store_as<stream>(p + i * stride, values[i]);
    }
}

}  // namespace fastres::cpu::FASTRES_ISA
