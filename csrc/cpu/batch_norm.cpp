#include "cpu/batch_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/batch_norm_passes.h"

namespace fastres::cpu {

bool takes_moments(const Activation& shape) {
    return shape.rows() >= 512;
}

void batch_norm(const BnForward& args, const ThreadPool& pool) {
    if (args.shape.dtype == Dtype::f64) return BnForwardPasses<double>(args, pool).run();
    return BnForwardPasses<float>(args, pool).run();
}

void batch_norm_backward(const BnBackward& args, const ThreadPool& pool) {
    if (args.shape.dtype == Dtype::f64) return BnBackwardPasses<double>(args, pool).run();
    return BnBackwardPasses<float>(args, pool).run();
}

Affine affine(int64_t channels, const ChannelVector& input_bias, const ChannelVector& running_mean,
              const ChannelVector& running_var, const ChannelVector& weight, const ChannelVector& bias,
              double eps) {
    Affine by{AlignedVector<float>(channels), AlignedVector<float>(channels)};
    // One vector after the other: so each loop is of one dtype.
    std::vector<double> scale(channels), shift(channels);
    const auto visit = [&](const ChannelVector& vector, double if_null, const auto& body) {
        if (vector && vector.dtype == Dtype::f32) {
            const float* values = static_cast<const float*>(vector.data);
            for (int64_t c = 0; c < channels; ++c) body(c, static_cast<double>(values[c]));
        } else {
            for (int64_t c = 0; c < channels; ++c) body(c, read(vector, c, if_null));
        }
    };
    visit(running_var, 1, [&](int64_t c, double v) { scale[c] = bn_math::reciprocal_std(v, eps); });
    visit(weight, 1, [&](int64_t c, double v) { scale[c] *= v; });
    visit(running_mean, 0, [&](int64_t c, double v) { shift[c] = -v; });
    visit(input_bias, 0, [&](int64_t c, double v) { shift[c] += v; });
    visit(bias, 0, [&](int64_t c, double v) { shift[c] = shift[c] * scale[c] + v; });
    std::copy(scale.begin(), scale.end(), by.scale.begin());
    std::copy(shift.begin(), shift.end(), by.shift.begin());
    return by;
}

BnCoefficients forward_coefficients(int64_t channels, const ChannelVector& weight,
                                    const ChannelVector& bias, const double* save_mean,
                                    const double* save_rstd) {
    ForwardCoefficients<float> forward(channels);
    forward.set_all(channels, save_mean, save_rstd, weight, bias);
    return {forward.mean, forward.scale, forward.shift, {}, {}};
}

BnInputGrad batch_norm_backward_sums(const BnBackward& args, const ThreadPool& pool) {
    return BnBackwardPasses<float>(args, pool).take_row_sums();
}

void add_relu(const AddRelu& args, const ThreadPool& pool) {
    const int64_t tasks = tasks_for(args.numel, args.numel, pool);
    const bool stream = cpu::streams(args.output, args.numel * size_of(args.dtype), 64);
    pool.for_each(tasks, [&](int64_t task) {
        const Range range = part(args.numel, tasks, task, 64);
        kernels().loops[args.dtype]->elementwise.add_relu(
            {at(args.input, range.begin, args.dtype), at(args.other, range.begin, args.dtype),
             at(args.output, range.begin, args.dtype), range.size(), stream});
    });
}

void add_relu_backward(const AddReluBackward& args, const ThreadPool& pool) {
    const int64_t tasks = tasks_for(args.numel, args.numel, pool);
    const bool stream = cpu::streams(args.grad_input, args.numel * size_of(args.dtype), 64);
    pool.for_each(tasks, [&](int64_t task) {
        const Range range = part(args.numel, tasks, task, 64);
        kernels().loops[args.dtype]->elementwise.add_relu_grad(
            {at(args.grad, range.begin, args.dtype), at(args.output, range.begin, args.dtype),
             at(args.grad_input, range.begin, args.dtype), range.size(), stream});
    });
}

}  // namespace fastres::cpu
