// Batch normalisation's loops over one piece: moments, apply, reduce, input gradient.
//
// Memory traffic is the bound, so each loop reads every operand once and front to back. Sums are taken in
// Real over eight values, as a tree, and then added to doubles: as accurate as double throughout, at an
// eighth of its conversions.
#pragma once

#include "core/bn_math.h"
#include "cpu/kernels.h"
#include "cpu/sweep.h"
#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_ISA {

inline constexpr int kSumUnroll = 8;
inline constexpr int kApplyUnroll = 4;
// A piece's sums live on the stack, for so many channels at once; more channels are handled in blocks. 256
// channels keep the sums in the L1 cache and every row's share of a block at 512 bytes or more.
inline constexpr int64_t kChannelBlock = 256;
// Moments are taken about the mean so far, which is renewed each so many values a channel; the first so
// many are summed twice, first to find their mean. So neither an outlier at the start nor a mean far from
// zero costs digits.
inline constexpr int64_t kMomentsWindow = 128;

template <class Lane, int n>
FASTRES_ALWAYS Lane tree_sum(Lane (&values)[n]) {
#pragma GCC unroll 8
    for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
}

template <class Wide>
FASTRES_ALWAYS void add_to_wide(double* sums, Wide value) {
    Wide total;
    memcpy(&total, sums, sizeof total);
    total += value;
    memcpy(sums, &total, sizeof total);
}

template <class Lane>
FASTRES_ALWAYS void add_to(double* sums, Lane value) {
    if constexpr (sizeof(Lane) <= sizeof(double)) {
        *sums += value;
    } else {
        add_to_wide(sums, widen(value));
    }
}

// Adds sum(a * b): what is left over of a tree, where rounding errors have no others to average with, in
// double.
template <class Lane, int n>
FASTRES_ALWAYS void add_products_to(double* sums, const Lane (&a)[n], const Lane (&b)[n]) {
    if constexpr (n > 1) {
        Lane products[n];
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) products[i] = a[i] * b[i];
        add_to(sums, tree_sum(products));
    } else if constexpr (sizeof(Lane) <= sizeof(double)) {
        *sums += static_cast<double>(a[0]) * static_cast<double>(b[0]);
    } else {
        add_to_wide(sums, widen(a[0]) * widen(b[0]));
    }
}

// Sums of a sweep: an entry a channel for rows, an entry a lane for a plane.
template <class Real>
FASTRES_ALWAYS double lane_sum(const double* sums) {
    double total = 0;
    for (int i = 0; i < kLanes<Real>; ++i) total += sums[i];
    return total;
}

template <class Lane, class Real>
FASTRES_ALWAYS Lane zero_where_not_above(Lane pre_activation, Real threshold, Lane grad) {
    // "not above" is written so that NaN counts as above: PyTorch's ReLU lets its gradient through.
    return pre_activation <= (Lane{} + threshold) ? Lane{} : grad;
}

// ---------------------------------------------------------------------------------------------------------
// moments

template <class T, class Order>
FASTRES_ALWAYS void shifted_sums(const T* input, int64_t rows, int64_t row_stride, int64_t channels,
                                 const RealOf<T>* shift, double* sum, double* sum_of_squares) {
    Order::template sweep<RealOf<T>, kSumUnroll>(
        rows, row_stride, channels,
        [&](auto step, int64_t offset, int64_t stride, int64_t c) __attribute__((always_inline)) {
            using S = decltype(step);
            using Lane = typename S::Lane;
            const Lane center = Order::template coefficient<Lane>(shift, c);
            Lane deviation[S::unroll];
#pragma GCC unroll 8
            for (int i = 0; i < S::unroll; ++i) {
                __builtin_prefetch(input + offset + (i + S::unroll) * stride);
                deviation[i] = load_as<Lane>(input + offset + i * stride) - center;
            }
            add_products_to(sum_of_squares + c, deviation, deviation);
            add_to(sum + c, tree_sum(deviation));
        });
}

// Where moments are taken about. An infinity in the input must reach the mean as itself, so never about
// that.
template <class Real>
FASTRES_ALWAYS Real finite_or_zero(Real value) {
    return value - value == 0 ? value : Real(0);
}

template <class T>
void moments_rows(const MomentsPiece& piece) {
    using Real = RealOf<T>;
    alignas(64) Real shift[kChannelBlock];
    alignas(64) double sum[kChannelBlock], sum_of_squares[kChannelBlock];
    for (int64_t first = 0; first < piece.channels; first += kChannelBlock) {
        const int64_t channels =
            piece.channels - first < kChannelBlock ? piece.channels - first : kChannelBlock;
        const T* input = static_cast<const T*>(piece.input) + first;
        bn_math::Moments<double>* moments = piece.moments + first;
        for (int64_t row = 0; row < piece.rows; row += kMomentsWindow) {
            const int64_t rows = piece.rows - row < kMomentsWindow ? piece.rows - row : kMomentsWindow;
            const T* window = input + row * piece.channels;
            const auto sums_about = [&](const auto& center) {
                for (int64_t c = 0; c < channels; ++c) {
                    shift[c] = finite_or_zero(center(c));
                    sum[c] = sum_of_squares[c] = 0;
                }
                shifted_sums<T, Rows>(window, rows, piece.channels, channels, shift, sum, sum_of_squares);
            };
            if (moments[0].count == 0) {
                sums_about([&](int64_t c) { return to_real(window[c]); });
                sums_about([&](int64_t c) { return static_cast<Real>(shift[c] + sum[c] / rows); });
            } else {
                sums_about([&](int64_t c) { return static_cast<Real>(moments[c].mean); });
            }
            for (int64_t c = 0; c < channels; ++c)
                moments[c] = bn_math::merge(
                    moments[c], bn_math::from_shifted_sums<double>(static_cast<double>(rows), shift[c],
                                                                   sum[c], sum_of_squares[c]));
        }
    }
}

template <class T>
void moments_plane(const MomentsPiece& piece) {
    using Real = RealOf<T>;
    constexpr int64_t window_pixels = kMomentsWindow * kLanes<Real>;
    for (int64_t first = 0; first < piece.rows; first += window_pixels) {
        const int64_t pixels = piece.rows - first < window_pixels ? piece.rows - first : window_pixels;
        const T* window = static_cast<const T*>(piece.input) + first;
        Real shift;
        alignas(64) double sum[kLanes<Real>], sum_of_squares[kLanes<Real>];
        const auto sums_about = [&](Real center) {
            shift = finite_or_zero(center);
            for (int i = 0; i < kLanes<Real>; ++i) sum[i] = sum_of_squares[i] = 0;
            shifted_sums<T, Plane>(window, pixels, 0, 1, &shift, sum, sum_of_squares);
        };
        if (piece.moments->count == 0) {
            sums_about(to_real(*window));
            sums_about(static_cast<Real>(shift + lane_sum<Real>(sum) / pixels));
        } else {
            sums_about(static_cast<Real>(piece.moments->mean));
        }
        *piece.moments = bn_math::merge(
            *piece.moments,
            bn_math::from_shifted_sums<double>(static_cast<double>(pixels), shift, lane_sum<Real>(sum),
                                               lane_sum<Real>(sum_of_squares)));
    }
}

// ---------------------------------------------------------------------------------------------------------
// apply

template <class T, class Order, bool relu, bool residual, bool stream>
FASTRES_ALWAYS void apply_loop(const ApplyPiece& piece) {
    using Real = RealOf<T>;
    const T* input = static_cast<const T*>(piece.input);
    const T* addend = static_cast<const T*>(piece.residual);
    T* output = static_cast<T*>(piece.output);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    Order::template sweep<Real, kApplyUnroll>(
        piece.rows, piece.channels, piece.channels,
        [&](auto step, int64_t offset, int64_t stride, int64_t c) __attribute__((always_inline)) {
            using S = decltype(step);
            using Lane = typename S::Lane;
            const Lane center = Order::template coefficient<Lane>(mean, c);
            const Lane gain = Order::template coefficient<Lane>(scale, c);
            const Lane bias = Order::template coefficient<Lane>(shift, c);
#pragma GCC unroll 4
            for (int i = 0; i < S::unroll; ++i) {
                const int64_t at = offset + i * stride;
                __builtin_prefetch(input + at + 2 * S::unroll * stride);
                if constexpr (residual) __builtin_prefetch(addend + at + 2 * S::unroll * stride);
                Lane z = (load_as<Lane>(input + at) - center) * gain + bias;
                if constexpr (residual) z += load_as<Lane>(addend + at);
                if constexpr (relu) z = z < Lane{} ? Lane{} : z;
                store_as<stream>(output + at, z);
            }
        });
    if constexpr (stream) fence();
}

template <class T, class Order>
void apply(const ApplyPiece& piece) {
    const auto with_stream = [&](auto relu, auto residual) {
        return piece.stream ? apply_loop<T, Order, relu.value, residual.value, true>(piece)
                            : apply_loop<T, Order, relu.value, residual.value, false>(piece);
    };
    if (piece.relu) return piece.residual ? with_stream(True{}, True{}) : with_stream(True{}, False{});
    return piece.residual ? with_stream(False{}, True{}) : with_stream(False{}, False{});
}

// ---------------------------------------------------------------------------------------------------------
// reduce

template <class T, class Order, Mask mask, bool store_masked, bool store_grad_input>
FASTRES_ALWAYS void reduce_sums(const ReducePiece& piece, double* sum_grad, double* dot) {
    using Real = RealOf<T>;
    constexpr Real threshold = bn_math::largest_stored_as_zero(Storage<T>::dtype);
    const T* grad = static_cast<const T*>(piece.grad);
    const T* input = static_cast<const T*>(piece.input);
    const T* output = static_cast<const T*>(piece.output);
    T* masked_grad = static_cast<T*>(piece.masked_grad);
    T* grad_input = static_cast<T*>(piece.grad_input);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    Order::template sweep<Real, kSumUnroll>(
        piece.rows, piece.channels, piece.channels,
        [&](auto step, int64_t offset, int64_t stride, int64_t c) __attribute__((always_inline)) {
            using S = decltype(step);
            using Lane = typename S::Lane;
            const Lane center = Order::template coefficient<Lane>(mean, c);
            const Lane gain = Order::template coefficient<Lane>(scale, c);
            const Lane bias = Order::template coefficient<Lane>(shift, c);
            Lane gradients[S::unroll], deviations[S::unroll];
#pragma GCC unroll 8
            for (int i = 0; i < S::unroll; ++i) {
                const int64_t at = offset + i * stride;
                __builtin_prefetch(input + at + S::unroll * stride);
                __builtin_prefetch(grad + at + S::unroll * stride);
                const Lane deviation = load_as<Lane>(input + at) - center;
                Lane g = load_as<Lane>(grad + at);
                if constexpr (mask == Mask::from_output)
                    g = zero_where_not_above(load_as<Lane>(output + at), Real(0), g);
                if constexpr (mask == Mask::recomputed)
                    g = zero_where_not_above(deviation * gain + bias, threshold, g);
                if constexpr (store_masked) store_as<false>(masked_grad + at, g);
                if constexpr (store_grad_input) store_as<false>(grad_input + at, g * gain);
                gradients[i] = g;
                deviations[i] = deviation;
            }
            add_products_to(dot + c, gradients, deviations);
            add_to(sum_grad + c, tree_sum(gradients));
        });
}

template <class T, class Order, Mask mask, bool store_masked, bool store_grad_input>
FASTRES_ALWAYS void reduce_loop(const ReducePiece& piece) {
    if constexpr (Order::is_plane) {
        using Real = RealOf<T>;
        alignas(64) double sum_grad[kLanes<Real>] = {}, dot[kLanes<Real>] = {};
        reduce_sums<T, Order, mask, store_masked, store_grad_input>(piece, sum_grad, dot);
        *piece.sum_grad += lane_sum<Real>(sum_grad);
        *piece.dot += lane_sum<Real>(dot);
    } else {
        reduce_sums<T, Order, mask, store_masked, store_grad_input>(piece, piece.sum_grad, piece.dot);
    }
}

template <class T, class Order>
void reduce(const ReducePiece& piece) {
    const auto with_mask = [&](auto store_masked, auto store_grad_input) {
        switch (piece.mask) {
            case Mask::none:
                return reduce_loop<T, Order, Mask::none, store_masked.value, store_grad_input.value>(piece);
            case Mask::from_output:
                return reduce_loop<T, Order, Mask::from_output, store_masked.value, store_grad_input.value>(
                    piece);
            case Mask::recomputed:
                return reduce_loop<T, Order, Mask::recomputed, store_masked.value, store_grad_input.value>(
                    piece);
        }
    };
    if (piece.masked_grad) return piece.grad_input ? with_mask(True{}, True{}) : with_mask(True{}, False{});
    return piece.grad_input ? with_mask(False{}, True{}) : with_mask(False{}, False{});
}

// ---------------------------------------------------------------------------------------------------------
// input gradient

template <class T, class Order, bool recompute_mask, bool stream>
FASTRES_ALWAYS void input_grad_loop(const InputGradPiece& piece) {
    using Real = RealOf<T>;
    constexpr Real threshold = bn_math::largest_stored_as_zero(Storage<T>::dtype);
    const T* grad = static_cast<const T*>(piece.grad);
    const T* input = static_cast<const T*>(piece.input);
    T* grad_input = static_cast<T*>(piece.grad_input);
    const Real* mean = static_cast<const Real*>(piece.mean);
    const Real* scale = static_cast<const Real*>(piece.scale);
    const Real* shift = static_cast<const Real*>(piece.shift);
    const Real* mean_grad = static_cast<const Real*>(piece.mean_grad);
    const Real* slope = static_cast<const Real*>(piece.slope);
    Order::template sweep<Real, kApplyUnroll>(
        piece.rows, piece.channels, piece.channels,
        [&](auto step, int64_t offset, int64_t stride, int64_t c) __attribute__((always_inline)) {
            using S = decltype(step);
            using Lane = typename S::Lane;
            const Lane center = Order::template coefficient<Lane>(mean, c);
            const Lane gain = Order::template coefficient<Lane>(scale, c);
            const Lane bias = Order::template coefficient<Lane>(shift, c);
            const Lane average = Order::template coefficient<Lane>(mean_grad, c);
            const Lane tilt = Order::template coefficient<Lane>(slope, c);
#pragma GCC unroll 4
            for (int i = 0; i < S::unroll; ++i) {
                const int64_t at = offset + i * stride;
                __builtin_prefetch(input + at + S::unroll * stride);
                __builtin_prefetch(grad + at + S::unroll * stride);
                const Lane deviation = load_as<Lane>(input + at) - center;
                Lane g = load_as<Lane>(grad + at);
                if constexpr (recompute_mask)
                    g = zero_where_not_above(deviation * gain + bias, threshold, g);
                store_as<stream>(grad_input + at, gain * (g - average - deviation * tilt));
            }
        });
    if constexpr (stream) fence();
}

template <class T, class Order>
void input_grad(const InputGradPiece& piece) {
    if (piece.mask == Mask::recomputed)
        return piece.stream ? input_grad_loop<T, Order, true, true>(piece)
                            : input_grad_loop<T, Order, true, false>(piece);
    return piece.stream ? input_grad_loop<T, Order, false, true>(piece)
                        : input_grad_loop<T, Order, false, false>(piece);
}

}  // namespace fastres::cpu::FASTRES_ISA
