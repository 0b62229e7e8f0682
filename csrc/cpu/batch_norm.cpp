#include "cpu/batch_norm.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/bn_math.h"
#include "cpu/channel_vector.h"
#include "cpu/isa.h"

namespace fastres::cpu {
namespace {

using bn_math::Moments;

// Below so many elements a task is not worth its own thread (PyTorch's grain size for element-wise loops).
constexpr int64_t kElementsPerTask = 32768;

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// Part `index` of 0..total cut into `parts`, cuts on multiples of `grain`.
Range part(int64_t total, int64_t parts, int64_t index, int64_t grain = 1) {
    const int64_t grains = (total + grain - 1) / grain;
    return {std::min(total, grains * index / parts * grain),
            std::min(total, grains * (index + 1) / parts * grain)};
}

int64_t tasks_for(int64_t elements, int64_t splittable, const ThreadPool& pool) {
    const int64_t worthwhile = std::max<int64_t>(1, elements / kElementsPerTask);
    return std::max<int64_t>(1, std::min({pool.threads(), worthwhile, splittable}));
}

const void* at(const void* base, int64_t element, Dtype dtype) {
    return base ? static_cast<const char*>(base) + element * size_of(dtype) : nullptr;
}
void* at(void* base, int64_t element, Dtype dtype) {
    return base ? static_cast<char*>(base) + element * size_of(dtype) : nullptr;
}

// Twice what the private caches of a few cores hold.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// Outputs that no cache will hold are written past the caches: it saves the read that a plain store begins
// with. A streaming store takes whole aligned vectors, so that every row must begin on one.
bool streams(const Activation& shape, const void* output) {
    constexpr int64_t alignment = 64;
    return shape.bytes() >= kStreamingBytes && reinterpret_cast<uintptr_t>(output) % alignment == 0 &&
           shape.channels_last && shape.channels * size_of(shape.dtype) % alignment == 0;
}

// The part of a tensor that one call of a loop handles: rows begin..end, or one plane.
struct Piece {
    int64_t element;   // offset of the first element
    int64_t rows;      // rows or pixels
    int64_t channels;  // all, or 1
    int64_t channel;   // offset into the coefficients
};

// Calls visit(task, Piece) for the share of `task` out of `tasks`.
template <class Visit>
void visit_rows(const Activation& shape, int64_t tasks, int64_t task, const Visit& visit) {
    const Range rows = part(shape.rows(), tasks, task, 8);
    if (rows.size() > 0) visit(Piece{rows.begin * shape.channels, rows.size(), shape.channels, 0});
}
template <class Visit>
void visit_planes(const Activation& shape, int64_t channel, const Visit& visit) {
    for (int64_t n = 0; n < shape.batch; ++n)
        visit(Piece{(n * shape.channels + channel) * shape.pixels, shape.pixels, 1, channel});
}

// The forward map z = (y - mean) * scale + shift, one entry a channel, each rounded once from double. What
// the mean loses there is given back through the shift.
template <class Real>
struct ForwardCoefficients {
    explicit ForwardCoefficients(int64_t channels) : mean(channels), scale(channels), shift(channels) {}

    void set(int64_t c, double exact_mean, double rstd, double weight, double bias) {
        mean[c] = static_cast<Real>(exact_mean);
        scale[c] = static_cast<Real>(weight * rstd);
        shift[c] = static_cast<Real>(bias - (exact_mean - mean[c]) * scale[c]);
    }

    std::vector<Real> mean, scale, shift;
};

template <class Real>
class Forward {
  public:
    Forward(const BnForward& args, const ThreadPool& pool)
        : args_(args), shape_(args.shape), pool_(pool), coefficients_(args.shape.channels) {}

    void run() {
        if (shape_.channels_last) {
            run_rows();
        } else {
            run_planes();
        }
    }

  private:
    const Kernels::Layout& loops() const {
        const int dtype = static_cast<int>(shape_.dtype);
        return shape_.channels_last ? kernels().rows[dtype] : kernels().plane[dtype];
    }

    void run_rows() {
        const int64_t tasks = tasks_for(shape_.numel(), shape_.rows(), pool_);
        const int64_t channels = shape_.channels;
        if (args_.training) {
            std::vector<Moments<double>> partial(tasks * channels, Moments<double>{0, 0, 0});
            pool_.for_each(tasks, [&](int64_t task) {
                visit_rows(shape_, tasks, task,
                           [&](const Piece& piece) { moments(piece, partial.data() + task * channels); });
            });
            for (int64_t c = 0; c < channels; ++c) {
                Moments<double> total = partial[c];
                for (int64_t task = 1; task < tasks; ++task)
                    total = bn_math::merge(total, partial[task * channels + c]);
                take_batch_statistics(c, total);
            }
        } else {
            for (int64_t c = 0; c < channels; ++c) take_running_statistics(c);
        }
        const bool stream = streams(shape_, args_.output);
        pool_.for_each(tasks, [&](int64_t task) {
            visit_rows(shape_, tasks, task, [&](const Piece& piece) { apply(piece, stream); });
        });
    }

    void run_planes() {
        const int64_t tasks = tasks_for(shape_.numel(), shape_.channels, pool_);
        pool_.for_each(tasks, [&](int64_t task) {
            const Range channels = part(shape_.channels, tasks, task);
            for (int64_t c = channels.begin; c < channels.end; ++c) {
                if (args_.training) {
                    Moments<double> total{0, 0, 0};
                    visit_planes(shape_, c, [&](const Piece& piece) { moments(piece, &total); });
                    take_batch_statistics(c, total);
                } else {
                    take_running_statistics(c);
                }
                visit_planes(shape_, c, [&](const Piece& piece) { apply(piece, false); });
            }
        });
    }

    void moments(const Piece& piece, Moments<double>* into) const {
        loops().moments({at(args_.input, piece.element, shape_.dtype), piece.rows, piece.channels, into});
    }

    void apply(const Piece& piece, bool stream) const {
        loops().apply(
            {at(args_.input, piece.element, shape_.dtype), at(args_.residual, piece.element, shape_.dtype),
             at(args_.output, piece.element, shape_.dtype), piece.rows, piece.channels,
             coefficients_.mean.data() + piece.channel, coefficients_.scale.data() + piece.channel,
             coefficients_.shift.data() + piece.channel, args_.relu, stream});
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

    void take_running_statistics(int64_t c) {
        take(c, read(args_.running_mean, c, 0), read(args_.running_var, c, 1));
    }

    void take(int64_t c, double mean, double variance) {
        const double rstd = bn_math::reciprocal_std(variance, args_.eps);
        static_cast<double*>(args_.save_mean)[c] = mean;
        static_cast<double*>(args_.save_rstd)[c] = rstd;
        coefficients_.set(c, mean, rstd, read(args_.weight, c, 1), read(args_.bias, c, 0));
    }

    const BnForward& args_;
    const Activation& shape_;
    const ThreadPool& pool_;
    ForwardCoefficients<Real> coefficients_;
};

template <class Real>
class Backward {
  public:
    Backward(const BnBackward& args, const ThreadPool& pool)
        : args_(args),
          shape_(args.shape),
          pool_(pool),
          mean_(static_cast<const double*>(args.save_mean)),
          rstd_(static_cast<const double*>(args.save_rstd)),
          mask_(!args.relu    ? Mask::none
                : args.output ? Mask::from_output
                              : Mask::recomputed),
          forward_(args.shape.channels),
          mean_grad_(args.shape.channels),
          slope_(args.shape.channels) {
        for (int64_t c = 0; c < shape_.channels; ++c)
            forward_.set(c, mean_[c], rstd_[c], read(args_.weight, c, 1), read(args_.bias, c, 0));
    }

    void run() {
        if (shape_.channels_last) {
            run_rows();
        } else {
            run_planes();
        }
    }

  private:
    const Kernels::Layout& loops() const {
        const int dtype = static_cast<int>(shape_.dtype);
        return shape_.channels_last ? kernels().rows[dtype] : kernels().plane[dtype];
    }

    void run_rows() {
        const int64_t tasks = tasks_for(shape_.numel(), shape_.rows(), pool_);
        const int64_t channels = shape_.channels;
        std::vector<double> partial(2 * tasks * channels, 0.0);  // [task][sum_grad | dot][channel]
        pool_.for_each(tasks, [&](int64_t task) {
            double* sums = partial.data() + 2 * task * channels;
            visit_rows(shape_, tasks, task,
                       [&](const Piece& piece) { reduce(piece, sums, sums + channels); });
        });
        for (int64_t c = 0; c < channels; ++c) {
            double sum_grad = 0, dot = 0;
            for (int64_t task = 0; task < tasks; ++task) {
                sum_grad += partial[2 * task * channels + c];
                dot += partial[(2 * task + 1) * channels + c];
            }
            take_sums(c, sum_grad, dot);
        }
        if (!args_.training) return;  // grad_input was written by reduce
        const bool stream = streams(shape_, args_.grad_input);
        pool_.for_each(tasks, [&](int64_t task) {
            visit_rows(shape_, tasks, task, [&](const Piece& piece) { input_grad(piece, stream); });
        });
    }

    void run_planes() {
        const int64_t tasks = tasks_for(shape_.numel(), shape_.channels, pool_);
        pool_.for_each(tasks, [&](int64_t task) {
            const Range channels = part(shape_.channels, tasks, task);
            for (int64_t c = channels.begin; c < channels.end; ++c) {
                double sum_grad = 0, dot = 0;
                visit_planes(shape_, c, [&](const Piece& piece) { reduce(piece, &sum_grad, &dot); });
                take_sums(c, sum_grad, dot);
                if (args_.training)
                    visit_planes(shape_, c, [&](const Piece& piece) { input_grad(piece, false); });
            }
        });
    }

    void reduce(const Piece& piece, double* sum_grad, double* dot) const {
        loops().reduce(
            {at(args_.grad, piece.element, shape_.dtype), at(args_.input, piece.element, shape_.dtype),
             at(args_.output, piece.element, shape_.dtype),
             at(args_.grad_residual, piece.element, shape_.dtype),
             args_.training ? nullptr : at(args_.grad_input, piece.element, shape_.dtype), piece.rows,
             piece.channels, forward_.mean.data() + piece.channel, forward_.scale.data() + piece.channel,
             forward_.shift.data() + piece.channel, mask_, sum_grad, dot});
    }

    void input_grad(const Piece& piece, bool stream) const {
        // Where the masked gradient was written for the residual, it is read from there.
        const void* grad = args_.grad_residual ? args_.grad_residual : args_.grad;
        const Mask mask = args_.grad_residual ? Mask::none : mask_;
        loops().input_grad({at(grad, piece.element, shape_.dtype),
                            at(args_.input, piece.element, shape_.dtype),
                            at(args_.grad_input, piece.element, shape_.dtype), piece.rows, piece.channels,
                            forward_.mean.data() + piece.channel, forward_.scale.data() + piece.channel,
                            forward_.shift.data() + piece.channel, mean_grad_.data() + piece.channel,
                            slope_.data() + piece.channel, mask, stream});
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
    const double* mean_;
    const double* rstd_;
    const Mask mask_;
    ForwardCoefficients<Real> forward_;
    std::vector<Real> mean_grad_, slope_;
};

}  // namespace

void batch_norm(const BnForward& args, const ThreadPool& pool) {
    if (args.shape.dtype == Dtype::f64) return Forward<double>(args, pool).run();
    return Forward<float>(args, pool).run();
}

void batch_norm_backward(const BnBackward& args, const ThreadPool& pool) {
    if (args.shape.dtype == Dtype::f64) return Backward<double>(args, pool).run();
    return Backward<float>(args, pool).run();
}

void add_relu(const AddRelu& args, const ThreadPool& pool) {
    const int64_t tasks = tasks_for(args.numel, args.numel, pool);
    pool.for_each(tasks, [&](int64_t task) {
        const Range range = part(args.numel, tasks, task, 64);
        kernels().elementwise[static_cast<int>(args.dtype)].add_relu(
            {at(args.input, range.begin, args.dtype), at(args.other, range.begin, args.dtype),
             at(args.output, range.begin, args.dtype), range.size(),
             args.numel * size_of(args.dtype) >= kStreamingBytes &&
                 reinterpret_cast<uintptr_t>(args.output) % 64 == 0});
    });
}

void add_relu_backward(const AddReluBackward& args, const ThreadPool& pool) {
    const int64_t tasks = tasks_for(args.numel, args.numel, pool);
    pool.for_each(tasks, [&](int64_t task) {
        const Range range = part(args.numel, tasks, task, 64);
        kernels().elementwise[static_cast<int>(args.dtype)].add_relu_grad(
            {at(args.grad, range.begin, args.dtype), at(args.output, range.begin, args.dtype),
             at(args.grad_input, range.begin, args.dtype), range.size(),
             args.numel * size_of(args.dtype) >= kStreamingBytes &&
                 reinterpret_cast<uintptr_t>(args.grad_input) % 64 == 0});
    });
}

}  // namespace fastres::cpu
