// Batch normalisation's loops over one piece: shifted sums, apply, reduce, input gradient.
//
// Memory traffic is the bound, so each loop reads every operand once and front to back. Sums are taken in
// Real over a window of rows, in an array that stays in the L1 cache or in registers, and then added to
// doubles: nearly as accurate as double throughout, at a fraction of its conversions.
#pragma once

#include "cpu/bn_lanes.h"
#include "cpu/kernels.h"
#include "cpu/sweep.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

// So many bodies' sums are added up in Real before the sum goes on in double.
inline constexpr int64_t kWindow = 16;

template <class Lane, int n>
FASTRES_ALWAYS Lane tree_sum(Lane (&values)[n]) {
#pragma GCC unroll 8
    for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
}

template <class Lane, int n>
FASTRES_ALWAYS void multiply(const Lane (&a)[n], const Lane (&b)[n], Lane (&products)[n]) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) products[i] = a[i] * b[i];
}

// A window's sums of all channels of some rows.
template <class Order, class Real>
struct RowSums {
    Real* entries;  // [channels]

    void clear(int64_t channels) const { memset(entries, 0, static_cast<size_t>(channels) * sizeof(Real)); }

    template <class Lane, int unroll>
    __attribute__((always_inline)) void add(int64_t channel, Lane (&values)[unroll]) const {
        if constexpr (Order::lanes == Lanes::neighbouring_channels) {
#pragma GCC unroll 4
            for (int i = 0; i < unroll; ++i) add_to(entries + channel + i * kLanes<Real>, values[i]);
        } else {
            add_to(entries + channel, tree_sum(values));
        }
    }
    template <class Lane, int unroll>
    __attribute__((always_inline)) void add_products(int64_t channel, const Lane (&a)[unroll],
                                                     const Lane (&b)[unroll]) const {
        Lane products[unroll];
        multiply(a, b, products);
        add(channel, products);
    }

    __attribute__((always_inline)) void add_to_totals(int64_t channels, double* totals) const {
        int64_t c = 0;
        for (; c + kLanes<Real> <= channels; c += kLanes<Real>)
            add_to(totals + c, widen(load(entries + c)));
        for (; c < channels; ++c) totals[c] += entries[c];
    }
};

// The same, in double.
template <class Order, class Real>
struct WideRowSums {
    double* entries;  // [channels]

    template <class Lane, int unroll>
    __attribute__((always_inline)) void add(int64_t channel, const Lane (&values)[unroll]) const {
#pragma GCC unroll 4
        for (int i = 0; i < unroll; ++i) add_to(entry(channel, i), widen(values[i]));
    }
    template <class Lane, int unroll>
    __attribute__((always_inline)) void add_products(int64_t channel, const Lane (&a)[unroll],
                                                     const Lane (&b)[unroll]) const {
#pragma GCC unroll 4
        for (int i = 0; i < unroll; ++i) add_to(entry(channel, i), widen(a[i]) * widen(b[i]));
    }

  private:
    __attribute__((always_inline)) double* entry(int64_t channel, int i) const {
        return entries + channel + (Order::lanes == Lanes::neighbouring_channels ? i * kLanes<Real> : 0);
    }
};

// A window's sum of one plane.
template <class Real>
struct PlaneSum {
    Vec<Real> lanes{};
    double rest = 0;  // of the pixels that fill no vector

    template <class Lane, int unroll>
    __attribute__((always_inline)) void add(int64_t, Lane (&values)[unroll]) {
        if constexpr (sizeof(Lane) == sizeof(Real)) {
            rest += tree_sum(values);
        } else {
            lanes += tree_sum(values);
        }
    }
    template <class Lane, int unroll>
    __attribute__((always_inline)) void add_products(int64_t channel, const Lane (&a)[unroll],
                                                     const Lane (&b)[unroll]) {
        Lane products[unroll];
        multiply(a, b, products);
        add(channel, products);
    }

    __attribute__((always_inline)) double total() const { return sum_of_lanes(lanes) + rest; }
};

// The same, in double.
template <class Real>
struct WidePlaneSum {
    WideVec<Real> lanes{};
    double rest = 0;

    template <class Lane, int unroll>
    __attribute__((always_inline)) void add(int64_t, const Lane (&values)[unroll]) {
#pragma GCC unroll 4
        for (int i = 0; i < unroll; ++i) add_wide(widen(values[i]));
    }
    template <class Lane, int unroll>
    __attribute__((always_inline)) void add_products(int64_t, const Lane (&a)[unroll],
                                                     const Lane (&b)[unroll]) {
#pragma GCC unroll 4
        for (int i = 0; i < unroll; ++i) add_wide(widen(a[i]) * widen(b[i]));
    }

    __attribute__((always_inline)) double total() const {
        double total = rest;
        for (int i = 0; i < kLanes<Real>; ++i) total += lanes[i];
        return total;
    }

  private:
    __attribute__((always_inline)) void add_wide(double value) { rest += value; }
    __attribute__((always_inline)) void add_wide(WideVec<Real> value) { lanes += value; }
};

// Two sums over a piece: sweep(order, offset, rows, first channel, sum, sum) takes a part of it, a window
// or, where sums are in double, all rows.
template <class Order, class Real, class Piece, class Sweep>
FASTRES_ALWAYS void take_sums(const Piece& piece, double* first_total, double* second_total,
                              const Sweep& sweep) {
    constexpr bool plane = Order::lanes == Lanes::pixels_of_a_channel;
    constexpr int64_t rows_in_a_body = Order::lanes == Lanes::neighbouring_channels ? 1 : Order::unroll;
    constexpr int64_t window = kWindow * rows_in_a_body * (plane ? kLanes<Real> : 1);
    for (int64_t c = 0; c < sweeps<Order>(piece); ++c) {
        if (piece.in_double) {
            const typename Order::Plain plain;
            if constexpr (plane) {
                WidePlaneSum<Real> first, second;
                sweep(plain, c * piece.plane_stride, piece.rows, c, first, second);
                first_total[c] += first.total();
                second_total[c] += second.total();
            } else {
                const WideRowSums<typename Order::Plain, Real> first{first_total}, second{second_total};
                sweep(plain, int64_t{0}, piece.rows, c, first, second);
            }
            continue;
        }
        for (int64_t row = 0; row < piece.rows; row += window) {
            const int64_t rows = piece.rows - row < window ? piece.rows - row : window;
            if constexpr (plane) {
                PlaneSum<Real> first, second;
                sweep(Order{}, c * piece.plane_stride + row, rows, c, first, second);
                first_total[c] += first.total();
                second_total[c] += second.total();
            } else {
                const RowSums<Order, Real> first{static_cast<Real*>(piece.partial.first)};
                const RowSums<Order, Real> second{static_cast<Real*>(piece.partial.second)};
                first.clear(piece.channels);
                second.clear(piece.channels);
                sweep(Order{}, row * piece.channels, rows, c, first, second);
                first.add_to_totals(piece.channels, first_total);
                second.add_to_totals(piece.channels, second_total);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// shifted sums

template <class T, class AnyOrder>
void shifted_sums(const ShiftedSumsPiece& piece) {
    using Real = RealOf<T>;
    const Real* shift = static_cast<const Real*>(piece.shift);
    take_sums<AnyOrder, Real>(
        piece, piece.sum, piece.sum_of_squares,
        [&](auto order, int64_t start, int64_t rows, int64_t first, auto& sum, auto& sum_of_squares) {
            using Order = decltype(order);
            const T* input = static_cast<const T*>(piece.input) + start;
            Order::template sweep<Real>(
                rows, piece.channels,
                [&](auto step, int64_t offset, int64_t stride, int64_t c) FASTRES_INLINE_BODY {
                    using S = decltype(step);
                    using Lane = typename S::Lane;
                    Lane deviation[S::unroll];
                    Order::template fetch<S>(input, offset, stride, c);
#pragma GCC unroll 4
                    for (int i = 0; i < S::unroll; ++i) {
                        deviation[i] = load_as<Lane>(input + offset + i * stride) -
                                       coefficient<Order, Lane>(shift + first, c, i);
                    }
                    sum_of_squares.add_products(c, deviation, deviation);
                    sum.add(c, deviation);
                });
        });
}

// loop(True or False): whether it stores past the caches.
template <class T, class Order, class Piece, class Loop>
FASTRES_ALWAYS void choose_stores(const Piece& piece, const Loop& loop) {
    if constexpr (kStreams<T> && Order::lanes != Lanes::pixels_of_a_channel)
        if (piece.stream) return loop(True{});
    loop(False{});
}

// ---------------------------------------------------------------------------------------------------------
// apply

template <class T, class Order, bool residual, bool stream>
FASTRES_ALWAYS void apply_loop(const ApplyPiece& piece) {
    using Real = RealOf<T>;
    const T* input = static_cast<const T*>(piece.input);
    const T* addend = static_cast<const T*>(piece.residual);
    T* output = static_cast<T*>(piece.output);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    const Real floor = piece.relu ? Real(0) : -static_cast<Real>(INFINITY);
    for (int64_t first = 0; first < sweeps<Order>(piece); ++first) {
        const int64_t start = first * piece.plane_stride;
        Order::template sweep<Real>(
            piece.rows, piece.channels,
            [&](auto step, int64_t offset, int64_t stride, int64_t c) FASTRES_INLINE_BODY {
                using S = decltype(step);
                using Lane = typename S::Lane;
                Lane z[S::unroll];
#pragma GCC unroll 4
                for (int i = 0; i < S::unroll; ++i) {
                    const int64_t at = start + offset + i * stride;
                    z[i] =
                        normalise(load_as<Lane>(input + at), coefficient<Order, Lane>(mean + first, c, i),
                                  coefficient<Order, Lane>(scale + first, c, i),
                                  coefficient<Order, Lane>(shift + first, c, i));
                    if constexpr (residual) z[i] += load_as<Lane>(addend + at);
                    z[i] = not_below(floor, z[i]);
                }
                store_lanes<Order, stream>(output + start + offset, stride, z);
            });
    }
    if constexpr (stream) fence();
}

template <class T, class Order>
void apply(const ApplyPiece& piece) {
    choose_stores<T, Order>(piece, [&](auto stream) FASTRES_INLINE_BODY {
        return piece.residual ? apply_loop<T, Order, true, stream.value>(piece)
                              : apply_loop<T, Order, false, stream.value>(piece);
    });
}

// ---------------------------------------------------------------------------------------------------------
// reduce

template <class T, class AnyOrder, Mask mask, bool sums_alone>
FASTRES_ALWAYS void reduce_loop(const ReducePiece& piece) {
    using Real = RealOf<T>;
    const T* grad = static_cast<const T*>(piece.grad);
    const T* input = static_cast<const T*>(piece.input);
    const T* output = static_cast<const T*>(piece.output);
    T* masked_grad = static_cast<T*>(piece.masked_grad);
    T* grad_input = static_cast<T*>(piece.grad_input);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    take_sums<AnyOrder, Real>(
        piece, piece.sum_grad, piece.dot,
        [&](auto order, int64_t start, int64_t rows, int64_t first, auto& sum_grad, auto& dot)
            __attribute__((always_inline)) {
                using Order = decltype(order);
                Order::template sweep<Real>(
                    rows, piece.channels,
                    [&](auto step, int64_t offset, int64_t stride, int64_t c) FASTRES_INLINE_BODY {
                        using S = decltype(step);
                        using Lane = typename S::Lane;
                        Lane g[S::unroll], deviation[S::unroll], scaled[S::unroll];
                        Order::template fetch<S>(grad, start + offset, stride, c);
                        Order::template fetch<S>(input, start + offset, stride, c);
                        if constexpr (mask == Mask::from_output)
                            Order::template fetch<S>(output, start + offset, stride, c);
#pragma GCC unroll 4
                        for (int i = 0; i < S::unroll; ++i) {
                            const int64_t at = start + offset + i * stride;
                            deviation[i] =
                                load_as<Lane>(input + at) - coefficient<Order, Lane>(mean + first, c, i);
                            const Lane gain = coefficient<Order, Lane>(scale + first, c, i);
                            g[i] = load_as<Lane>(grad + at);
                            if constexpr (mask == Mask::from_output)
                                g[i] = zero_where_not_above(load_as<Lane>(output + at), Real(0), g[i]);
                            if constexpr (mask == Mask::recomputed)
                                g[i] = mask_recomputed<T>(g[i], deviation[i], gain,
                                                          coefficient<Order, Lane>(shift + first, c, i));
                            scaled[i] = g[i] * gain;
                        }
                        if constexpr (mask == Mask::from_output)
                            store_lanes<Order, false>(masked_grad + start + offset, stride, g);
                        if (!sums_alone && grad_input)
                            store_lanes<Order, false>(grad_input + start + offset, stride, scaled);
                        dot.add_products(c, g, deviation);
                        sum_grad.add(c, g);
                    });
            });
}

// In one order where something is stored, in another where sums are all that is taken.
template <class T, class StoreOrder, class SumOrder, Mask mask>
FASTRES_ALWAYS void reduce_by(const ReducePiece& piece) {
    if constexpr (StoreOrder::lanes != SumOrder::lanes && mask != Mask::from_output)
        if (!piece.grad_input) return reduce_loop<T, SumOrder, mask, true>(piece);
    reduce_loop<T, StoreOrder, mask, false>(piece);
}

template <class T, class StoreOrder, class SumOrder>
void reduce(const ReducePiece& piece) {
    switch (piece.mask) {
        case Mask::none:
            return reduce_by<T, StoreOrder, SumOrder, Mask::none>(piece);
        case Mask::from_output:
            return reduce_by<T, StoreOrder, SumOrder, Mask::from_output>(piece);
        case Mask::recomputed:
            return reduce_by<T, StoreOrder, SumOrder, Mask::recomputed>(piece);
    }
}

// ---------------------------------------------------------------------------------------------------------
// input gradient

template <class T, class Order, bool recompute_mask, bool stream>
FASTRES_ALWAYS void input_grad_loop(const InputGradPiece& piece) {
    using Real = RealOf<T>;
    const T* grad = static_cast<const T*>(piece.grad);
    const T* input = static_cast<const T*>(piece.input);
    T* grad_input = static_cast<T*>(piece.grad_input);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    const Real* mean_grad = static_cast<const Real*>(piece.mean_grad);
    const Real* slope = static_cast<const Real*>(piece.slope);
    for (int64_t first = 0; first < sweeps<Order>(piece); ++first) {
        const int64_t start = first * piece.plane_stride;
        Order::template sweep<Real>(
            piece.rows, piece.channels,
            [&](auto step, int64_t offset, int64_t stride, int64_t c) FASTRES_INLINE_BODY {
                using S = decltype(step);
                using Lane = typename S::Lane;
                Lane result[S::unroll];
#pragma GCC unroll 4
                for (int i = 0; i < S::unroll; ++i) {
                    const int64_t at = start + offset + i * stride;
                    const Lane deviation =
                        load_as<Lane>(input + at) - coefficient<Order, Lane>(mean + first, c, i);
                    const Lane gain = coefficient<Order, Lane>(scale + first, c, i);
                    Lane g = load_as<Lane>(grad + at);
                    if constexpr (recompute_mask)
                        g = mask_recomputed<T>(g, deviation, gain,
                                               coefficient<Order, Lane>(shift + first, c, i));
                    result[i] = input_gradient(g, deviation, gain,
                                               coefficient<Order, Lane>(mean_grad + first, c, i),
                                               coefficient<Order, Lane>(slope + first, c, i));
                }
                store_lanes<Order, stream>(grad_input + start + offset, stride, result);
            });
    }
    if constexpr (stream) fence();
}

template <class T, class Order>
void input_grad(const InputGradPiece& piece) {
    choose_stores<T, Order>(piece, [&](auto stream) FASTRES_INLINE_BODY {
        return piece.mask == Mask::recomputed ? input_grad_loop<T, Order, true, stream.value>(piece)
                                              : input_grad_loop<T, Order, false, stream.value>(piece);
    });
}

}  // namespace fastres::cpu::FASTRES_ISA
