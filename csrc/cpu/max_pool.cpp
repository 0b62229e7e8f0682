#include "cpu/max_pool.h"

#include <algorithm>
#include <vector>

#include "cpu/batch_norm_passes.h"
#include "cpu/max_pool_windows.h"
#include "cpu/workspace.h"

namespace fastres::cpu {
namespace {

// Memory for `rows` rows of a channels-last image, one after the other.
class RowBuffer {
  public:
    RowBuffer(const Activation& shape, const MaxPool2d& pool, int64_t rows, Workspace& workspace)
        : row_bytes_(pool.in.w * shape.channels * size_of(shape.dtype)),
          data_(reinterpret_cast<char*>(
              workspace.floats(ceil_div(rows * row_bytes_, int64_t{sizeof(float)})))) {}

    void* operator[](int64_t row) const { return data_ + row * row_bytes_; }

  private:
    const int64_t row_bytes_;
    char* const data_;
};

Range pixels_of(const MaxPool2d& pool, int64_t row) {
    return {row * pool.in.w, (row + 1) * pool.in.w};
}

template <class Real>
void forward(const BnMaxPoolForward& args, const ThreadPool& threads) {
    const Activation& shape = args.norm.shape;
    const MaxPool2d& pool = args.pool;
    BnForwardPasses<Real> norm(args.norm, threads);
    norm.take_row_statistics();
    const int64_t rows = pool.batch * pool.out.h;
    const int64_t tasks = tasks_for(shape.numel(), rows, threads);
    threads.for_each(tasks, [&](int64_t task) {
        static thread_local Workspace workspace;
        const RowBuffer buffer(shape, pool, pool.kernel.h, workspace);
        std::vector<int64_t> held(pool.kernel.h, -1);  // rows of the input, by where they are in the buffer
        WindowRows windows(pool, shape.channels, shape.dtype);
        // The last ones first: they are what the pass before left in the caches.
        const Range of_task = part(rows, tasks, task);
        for (int64_t out_row = of_task.end - 1; out_row >= of_task.begin; --out_row) {
            const int64_t image = out_row / pool.out.h;
            const auto pixels = [&](int64_t row) {
                const int64_t in_row = image * pool.in.h + row, place = in_row % pool.kernel.h;
                if (held[place] != in_row) norm.apply_rows(pixels_of(pool, in_row), buffer[place]);
                held[place] = in_row;
                return buffer[place];
            };
            const int64_t element = out_row * pool.out.w * shape.channels;
            windows.maximum(out_row % pool.out.h, pixels, at(args.output, element, shape.dtype),
                            args.index + element);
        }
    });
}

// Makes the gradient of the activation, row by row.
class GradRows {
  public:
    explicit GradRows(const BnMaxPoolBackward& args)
        : args_(args), buffer_(args.norm.shape, args.pool, 1, workspace()), windows_(args.pool.kernel.h) {
        row_.windows = windows_.data();
        row_.kernel_w = args.pool.kernel.w;
        row_.stride = args.pool.stride.w;
        row_.padding = args.pool.padding.w;
        row_.width = args.pool.in.w;
        row_.out_width = args.pool.out.w;
        row_.channels = args.norm.shape.channels;
        row_.grad_input = buffer_[0];
    }

    const void* operator[](int64_t in_row) {
        const MaxPool2d& pool = args_.pool;
        const int64_t image = in_row / pool.in.h, row = in_row % pool.in.h + pool.padding.h;
        row_.count = 0;
        for (int64_t i = row % pool.stride.h; i < pool.kernel.h && i <= row; i += pool.stride.h) {
            const int64_t out_row = (row - i) / pool.stride.h;
            if (out_row >= pool.out.h) continue;
            const int64_t element = (image * pool.out.h + out_row) * pool.out.w * args_.norm.shape.channels;
            windows_[row_.count++] = {at(args_.grad, element, args_.norm.shape.dtype),
                                      args_.index + element, static_cast<int>(i * pool.kernel.w)};
        }
        kernels().loops[args_.norm.shape.dtype]->max_pool.backward(row_);
        return row_.grad_input;
    }

  private:
    static Workspace& workspace() {
        static thread_local Workspace workspace;
        return workspace;
    }

    const BnMaxPoolBackward& args_;
    const RowBuffer buffer_;
    std::vector<MaxPoolGradRow::Window> windows_;
    MaxPoolGradRow row_{};
};

template <class Real>
void backward(const BnMaxPoolBackward& args, const ThreadPool& threads) {
    const MaxPool2d& pool = args.pool;
    BnBackwardPasses<Real> norm(args.norm, threads);
    const int64_t rows = pool.batch * pool.in.h;
    const int64_t tasks = tasks_for(args.norm.shape.numel(), rows, threads);
    std::vector<Sums<Real>> sums(tasks, norm.empty_sums());
    threads.for_each(tasks, [&](int64_t task) {
        GradRows grad(args);
        const Range of_task = part(rows, tasks, task);
        for (int64_t row = of_task.begin; row < of_task.end; ++row)
            norm.reduce_rows(pixels_of(pool, row), grad[row], sums[task]);
    });
    norm.take_sums(sums);
    if (!args.norm.training) return;  // grad_input was written with the sums
    threads.for_each(tasks, [&](int64_t task) {
        GradRows grad(args);
        const Range of_task = part(rows, tasks, task);
        for (int64_t row = of_task.end - 1; row >= of_task.begin; --row)
            norm.input_grad_rows(pixels_of(pool, row), grad[row]);
    });
}

}  // namespace

void bn_max_pool(const BnMaxPoolForward& args, const ThreadPool& threads) {
    if (args.norm.shape.dtype == Dtype::f64) return forward<double>(args, threads);
    return forward<float>(args, threads);
}

void bn_max_pool_backward(const BnMaxPoolBackward& args, const ThreadPool& threads) {
    if (args.norm.shape.dtype == Dtype::f64) return backward<double>(args, threads);
    return backward<float>(args, threads);
}

}  // namespace fastres::cpu
