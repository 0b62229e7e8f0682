// The two passes over an activation that make a batch norm, and the two that make its gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/bn_math.h"
#include "cpu/aligned_vector.h"
#include "cpu/batch_norm.h"
#include "cpu/channel_vector.h"
#include "cpu/cut.h"
#include "cpu/isa.h"
#include "cpu/pointer.h"
#include "cpu/streaming.h"

namespace fastres::cpu {

using bn_math::Moments;

// Moments are taken about the mean of all rows before, over kWindowGrowth times as many rows: a mean far
// from zero costs no digits, and where the mean changes, the change is itself so much of the variance that
// the digits which it costs do not count. The first kFirstRows are taken twice: about their first value, to
// learn their mean, and about that.
inline constexpr int64_t kFirstRows = 16;
inline constexpr int64_t kWindowGrowth = 8;

inline bool streams(const void* output, const Activation& shape) {
    return shape.channels_last &&
           cpu::streams(output, shape.bytes(), shape.channels * size_of(shape.dtype));
}

// values[i] = values[i - channels] beyond the first `channels`, for rows that are taken as one.
template <class Values>
void repeat(Values& values, int64_t channels) {
    for (size_t i = channels; i < values.size(); ++i) values[i] = values[i - channels];
}

// The two sums that a pass takes, for one task.
template <class Real>
class Sums {
  public:
    explicit Sums(int64_t coefficients)
        : first(coefficients),
          second(coefficients),
          partial_first_(coefficients),
          partial_second_(coefficients) {}

    AlignedVector<double> first, second;

    PartialSums partial() { return {partial_first_.data(), partial_second_.data()}; }

    void clear() {
        std::fill(first.begin(), first.end(), 0.0);
        std::fill(second.begin(), second.end(), 0.0);
    }

    // Adds up what belongs to the same channel.
    void fold(int64_t channels) {
        const int64_t coefficients = static_cast<int64_t>(first.size());
        for (int64_t row = channels; row < coefficients; row += channels) {
            for (int64_t c = 0; c < channels; ++c) {
                first[c] += first[row + c];
                second[c] += second[row + c];
            }
        }
    }

  private:
    AlignedVector<Real> partial_first_, partial_second_;
};

// Up to here a channel's sums are taken in double from the first addition on. Float's errors in many values
// average out; those of few would be up to twice PyTorch's, which sums all in double.
inline bool few_values(const Activation& shape) {
    return shape.rows() <= 128;
}

// The forward map z = (y - mean) * scale + shift, one entry a channel, each rounded once from double. What
// the mean loses there is given back through the shift.
template <class Real>
struct ForwardCoefficients {
    explicit ForwardCoefficients(int64_t count) : mean(count), scale(count), shift(count) {}

    void set(int64_t c, double exact_mean, double rstd, double weight, double bias) {
        mean[c] = static_cast<Real>(exact_mean);
        scale[c] = static_cast<Real>(weight * rstd);
        shift[c] = static_cast<Real>(bias - (exact_mean - mean[c]) * scale[c]);
    }
    void set_all(int64_t channels, const double* means, const double* rstds, const ChannelVector& weight,
                 const ChannelVector& bias) {
        for (int64_t c = 0; c < channels; ++c)
            set(c, means[c], rstds[c], read(weight, c, 1), read(bias, c, 0));
    }

    AlignedVector<Real> mean, scale, shift;
};

template <class Real>
class BnForwardPasses {
  public:
    BnForwardPasses(const BnForward& args, const ThreadPool& pool)
        : args_(args),
          shape_(args.shape),
          pool_(pool),
          cut_(args.shape, pool),
          coefficients_(cut_.coefficients()),
          stream_(args.output && streams(args.output, args.shape)) {}

    void run() {
        if (shape_.channels_last) {
            run_rows();
        } else {
            run_planes();
        }
    }

    // Channels last, the first pass: what apply_rows then normalises by.
    void take_row_statistics() {
        const int64_t channels = shape_.channels;
        if (args_.moments) {
            for (int64_t c = 0; c < channels; ++c) take_batch_statistics(c, args_.moments[c]);
        } else if (args_.statistics == Statistics::batch) {
            std::vector<Moments<double>> moments(cut_.tasks() * channels, Moments<double>{0, 0, 0});
            pool_.for_each(cut_.tasks(), [&](int64_t task) {
                Scratch scratch(cut_.coefficients());
                cut_.visit_shares(task, [&](const Share& share) {
                    take_moments(share, scratch, moments.data() + task * channels);
                });
            });
            for (int64_t c = 0; c < channels; ++c) {
                Moments<double> total = moments[c];
                for (int64_t task = 1; task < cut_.tasks(); ++task)
                    total = bn_math::merge(total, moments[task * channels + c]);
                take_batch_statistics(c, total);
            }
        } else {
            for (int64_t c = 0; c < channels; ++c) take_given_statistics(c);
        }
        for (auto* values : {&coefficients_.mean, &coefficients_.scale, &coefficients_.shift})
            repeat(*values, channels);
    }

    // Of some rows, to memory that holds no others.
    void apply_rows(Range rows, void* output) const {
        apply({rows, {0, shape_.channels}}, output, rows.begin * shape_.channels);
    }

  private:
    struct Scratch {
        explicit Scratch(int64_t coefficients) : shift(coefficients), sums(coefficients) {}
        AlignedVector<Real> shift;
        Sums<Real> sums;
    };

    void run_rows() {
        take_row_statistics();
        pool_.for_each(cut_.tasks(), [&](int64_t task) {
            cut_.visit_shares(task, [&](const Share& share) { apply(share, args_.output, 0); });
        });
    }

    void run_planes() {
        pool_.for_each(cut_.tasks(), [&](int64_t task) {
            Scratch scratch(cut_.share_coefficients());
            std::vector<Moments<double>> moments(cut_.share_coefficients());
            cut_.visit_shares(task, [&](const Share& share) {
                const auto [begin, end] = share.channels;
                if (args_.statistics == Statistics::batch) {
                    take_moments(share, scratch, moments.data());
                    for (int64_t c = begin; c < end; ++c) take_batch_statistics(c, moments[c - begin]);
                } else {
                    for (int64_t c = begin; c < end; ++c) take_given_statistics(c);
                }
                apply(share, args_.output, 0);
            });
        });
    }

    // The moments of a share, an entry for each of its channels.
    void take_moments(const Share& share, Scratch& scratch, Moments<double>* moments) const {
        const int64_t channels = share.channels.size();
        const Share first{cut_.first_rows(share, kFirstRows), share.channels};
        for (int64_t c = 0; c < channels; ++c) moments[c] = {0, first_value(share, c), 0};
        merge_moments(first, scratch, moments);
        for (int64_t c = 0; c < channels; ++c) moments[c].count = 0;
        for (Range rows = first.rows; rows.size() > 0;) {
            merge_moments(Share{rows, share.channels}, scratch, moments);
            const int64_t before = rows.end - share.rows.begin;
            rows = {rows.end, std::min(share.rows.end, rows.end + kWindowGrowth * before)};
        }
    }

    // Merges a share, taken about the means so far, into `moments`.
    void merge_moments(const Share& share, Scratch& scratch, Moments<double>* moments) const {
        const int64_t channels = share.channels.size();
        const double count = static_cast<double>(share.rows.size());
        Sums<Real>& sums = scratch.sums;
        for (int64_t c = 0; c < channels; ++c)
            scratch.shift[c] = static_cast<Real>(std::isfinite(moments[c].mean) ? moments[c].mean : 0);
        if (shape_.channels_last) repeat(scratch.shift, channels);
        sums.clear();
        cut_.visit_pieces(share, [&](const Piece& piece) {
            cut_.loops().shifted_sums({at(args_.input, piece.element, shape_.dtype), piece.rows,
                                       piece.channels, shape_.pixels, scratch.shift.data(),
                                       few_values(shape_), sums.partial(), sums.first.data(),
                                       sums.second.data()});
        });
        if (shape_.channels_last) sums.fold(channels);
        for (int64_t c = 0; c < channels; ++c)
            moments[c] = bn_math::merge(
                moments[c],
                bn_math::from_shifted_sums<double>(count, scratch.shift[c], sums.first[c], sums.second[c]));
    }

    double first_value(const Share& share, int64_t c) const {
        const int64_t element = shape_.channels_last ? share.rows.begin * shape_.channels + c
                                                     : (share.channels.begin + c) * shape_.pixels;
        return read({const_cast<void*>(at(args_.input, element, shape_.dtype)), shape_.dtype}, 0, 0);
    }

    // `output` begins with element `first`.
    void apply(const Share& share, void* output, int64_t first) const {
        cut_.visit_pieces_backwards(share, [&](const Piece& piece) {
            cut_.loops().apply({at(args_.input, piece.element, shape_.dtype),
                                at(args_.residual, piece.element, shape_.dtype),
                                at(output, piece.element - first, shape_.dtype), piece.rows, piece.channels,
                                shape_.pixels, coefficients_.mean.data() + share.channels.begin,
                                coefficients_.scale.data() + share.channels.begin,
                                coefficients_.shift.data() + share.channels.begin, args_.relu, stream_});
        });
    }

    void take_batch_statistics(int64_t c, const Moments<double>& moments) {
        if (args_.running_mean)
            write(args_.running_mean, c,
                  bn_math::running_update(read(args_.running_mean, c, 0), moments.mean, args_.momentum));
        if (args_.running_var)
            write(args_.running_var, c,
                  bn_math::running_update(read(args_.running_var, c, 1),
                                          bn_math::unbiased_variance(moments), args_.momentum));
        take(c, moments.mean, moments.m2 / moments.count);
    }

    void take_given_statistics(int64_t c) {
        if (args_.statistics == Statistics::running) {
            take(c, read(args_.running_mean, c, 0), read(args_.running_var, c, 1));
        } else {
            set_coefficients(c);
        }
    }

    void take(int64_t c, double mean, double variance) {
        static_cast<double*>(args_.save_mean)[c] = mean;
        static_cast<double*>(args_.save_rstd)[c] = bn_math::reciprocal_std(variance, args_.eps);
        set_coefficients(c);
    }

    void set_coefficients(int64_t c) {
        coefficients_.set(c, static_cast<const double*>(args_.save_mean)[c],
                          static_cast<const double*>(args_.save_rstd)[c], read(args_.weight, c, 1),
                          read(args_.bias, c, 0));
    }

    const BnForward& args_;
    const Activation& shape_;
    const ThreadPool& pool_;
    const Cut cut_;
    ForwardCoefficients<Real> coefficients_;
    const bool stream_;
};

template <class Real>
class BnBackwardPasses {
  public:
    BnBackwardPasses(const BnBackward& args, const ThreadPool& pool)
        : args_(args),
          shape_(args.shape),
          pool_(pool),
          cut_(args.shape, pool),
          mean_(static_cast<const double*>(args.save_mean)),
          rstd_(static_cast<const double*>(args.save_rstd)),
          mask_(!args.relu    ? Mask::none
                : args.output ? Mask::from_output
                              : Mask::recomputed),
          rest_grad_(args.grad_residual ? args.grad_residual : args.grad),
          rest_mask_(args.grad_residual ? Mask::none : mask_),
          forward_(cut_.coefficients()),
          mean_grad_(cut_.coefficients()),
          slope_(cut_.coefficients()),
          stream_(streams(args.grad_input, args.shape)) {
        forward_.set_all(shape_.channels, mean_, rstd_, args_.weight, args_.bias);
        for (auto* values : {&forward_.mean, &forward_.scale, &forward_.shift})
            repeat(*values, shape_.channels);
    }

    void run() {
        if (shape_.channels_last) {
            run_rows();
        } else {
            run_planes();
        }
    }

    // The sums alone; what they make of the input's gradient is left to the caller.
    BnInputGrad take_row_sums() {
        reduce_rows();
        return {
            rest_grad_, rest_mask_, {forward_.mean, forward_.scale, forward_.shift, mean_grad_, slope_}};
    }

    // Channels last, the same in parts, of rows whose gradient is in memory that holds no others: the first
    // pass, for a task's own sums; what they give; and, in training, the second pass.
    Sums<Real> empty_sums() const { return Sums<Real>(cut_.coefficients()); }
    void reduce_rows(Range rows, const void* grad, Sums<Real>& sums) const {
        reduce({rows, {0, shape_.channels}}, grad, rows.begin * shape_.channels, sums);
    }
    void take_sums(std::vector<Sums<Real>>& sums) {
        for (Sums<Real>& of_task : sums) of_task.fold(shape_.channels);
        for (int64_t c = 0; c < shape_.channels; ++c) {
            double sum_grad = 0, dot = 0;
            for (const Sums<Real>& of_task : sums) {
                sum_grad += of_task.first[c];
                dot += of_task.second[c];
            }
            take_sums(c, sum_grad, dot);
        }
        for (auto* values : {&mean_grad_, &slope_}) repeat(*values, shape_.channels);
    }
    void input_grad_rows(Range rows, const void* grad) const {
        input_grad({rows, {0, shape_.channels}}, grad, rows.begin * shape_.channels);
    }

  private:
    void run_rows() {
        reduce_rows();
        if (!args_.training) return;  // grad_input was written by reduce
        pool_.for_each(cut_.tasks(), [&](int64_t task) {
            cut_.visit_shares(task, [&](const Share& share) { input_grad(share, rest_grad_, 0); });
        });
    }

    void reduce_rows() {
        std::vector<Sums<Real>> sums(cut_.tasks(), empty_sums());
        pool_.for_each(cut_.tasks(), [&](int64_t task) {
            cut_.visit_shares(task, [&](const Share& share) { reduce(share, args_.grad, 0, sums[task]); });
        });
        take_sums(sums);
    }

    void run_planes() {
        pool_.for_each(cut_.tasks(), [&](int64_t task) {
            Sums<Real> sums(cut_.share_coefficients());
            cut_.visit_shares(task, [&](const Share& share) {
                const auto [begin, end] = share.channels;
                sums.clear();
                reduce(share, args_.grad, 0, sums);
                for (int64_t c = begin; c < end; ++c)
                    take_sums(c, sums.first[c - begin], sums.second[c - begin]);
                if (args_.training) input_grad(share, rest_grad_, 0);
            });
        });
    }

    // `grad` begins with element `first`.
    void reduce(const Share& share, const void* grad, int64_t first, Sums<Real>& sums) const {
        cut_.visit_pieces(share, [&](const Piece& piece) {
            cut_.loops().reduce(
                {at(grad, piece.element - first, shape_.dtype),
                 at(args_.input, piece.element, shape_.dtype),
                 at(args_.output, piece.element, shape_.dtype),
                 at(args_.grad_residual, piece.element, shape_.dtype),
                 args_.training ? nullptr : at(args_.grad_input, piece.element, shape_.dtype), piece.rows,
                 piece.channels, shape_.pixels, forward_.mean.data() + share.channels.begin,
                 forward_.scale.data() + share.channels.begin, forward_.shift.data() + share.channels.begin,
                 mask_, few_values(shape_), sums.partial(), sums.first.data(), sums.second.data()});
        });
    }

    void input_grad(const Share& share, const void* grad, int64_t first) const {
        cut_.visit_pieces_backwards(share, [&](const Piece& piece) {
            cut_.loops().input_grad(
                {at(grad, piece.element - first, shape_.dtype),
                 at(args_.input, piece.element, shape_.dtype),
                 at(args_.grad_input, piece.element, shape_.dtype), piece.rows, piece.channels,
                 shape_.pixels, forward_.mean.data() + share.channels.begin,
                 forward_.scale.data() + share.channels.begin, forward_.shift.data() + share.channels.begin,
                 mean_grad_.data() + share.channels.begin, slope_.data() + share.channels.begin, rest_mask_,
                 stream_});
        });
    }

    void take_sums(int64_t c, double sum_grad, double dot) {
        // The loops take deviations from the rounded mean.
        const double rounding = mean_[c] - forward_.mean[c];
        const auto k = bn_math::backward_coefficients<double>(
            read(args_.weight, c, 1), rstd_[c], sum_grad, dot - rounding * sum_grad,
            static_cast<double>(shape_.rows()), args_.training);
        mean_grad_[c] = static_cast<Real>(k.mean_grad - rounding * k.slope);
        slope_[c] = static_cast<Real>(k.slope);
        static_cast<Real*>(args_.grad_weight)[c] = static_cast<Real>(k.dgamma);
        static_cast<Real*>(args_.grad_bias)[c] = static_cast<Real>(k.dbeta);
    }

    const BnBackward& args_;
    const Activation& shape_;
    const ThreadPool& pool_;
    const Cut cut_;
    const double* mean_;
    const double* rstd_;
    const Mask mask_;
    // After the sums: where the masked gradient was written for the residual, it is read from there.
    const void* const rest_grad_;
    const Mask rest_mask_;
    ForwardCoefficients<Real> forward_;
    AlignedVector<Real> mean_grad_, slope_;
    const bool stream_;
};

}  // namespace fastres::cpu
