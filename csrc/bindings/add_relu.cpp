// fastres::add_relu_forward and fastres::add_relu_backward: relu(input + other) and its gradient, in one
// pass each.
#include <torch/csrc/stable/library.h>

#include "bindings/device.h"
#include "bindings/tensor.h"
#include "core/batch_norm.h"
#include "cpu/batch_norm.h"
#if defined(FASTRES_CUDA)
#include "cuda/add_relu.h"
#endif

namespace fastres::bindings {
namespace {

struct OnCpu {
    static void run(const AddRelu& args, const Tensor&) { cpu::add_relu(args, torch_threads()); }
    static void run(const AddReluBackward& args, const Tensor&) {
        cpu::add_relu_backward(args, torch_threads());
    }
};

#if defined(FASTRES_CUDA)
struct OnCuda {
    static void run(const AddRelu& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        cuda::add_relu(args, current_stream(input));
    }
    static void run(const AddReluBackward& args, const Tensor& input) {
        const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
        cuda::add_relu_backward(args, current_stream(input));
    }
};
#endif

template <class Device>
Tensor forward(Tensor input, Tensor other) {
    const Activation shape = activation("add_relu_forward", "input", input);
    check_like_input("add_relu_forward", "other", other, input);
    Tensor output = output_like(input);
    const AddRelu args{shape.numel(), shape.dtype, input.data_ptr(), other.data_ptr(), output.data_ptr()};
    Device::run(args, input);
    return output;
}

template <class Device>
Tensor backward(Tensor grad, Tensor output) {
    const Activation shape = activation("add_relu_backward", "output", output);
    check_like_input("add_relu_backward", "grad", grad, output);
    Tensor grad_input = output_like(output);
    const AddReluBackward args{shape.numel(), shape.dtype, grad.data_ptr(), output.data_ptr(),
                               grad_input.data_ptr()};
    Device::run(args, output);
    return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastres, library) {
    library.def("add_relu_forward(Tensor input, Tensor other) -> Tensor");
    library.def("add_relu_backward(Tensor grad, Tensor output) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, library) {
    library.impl("add_relu_forward", TORCH_BOX(&forward<OnCpu>));
    library.impl("add_relu_backward", TORCH_BOX(&backward<OnCpu>));
}

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, library) {
    library.impl("add_relu_forward", TORCH_BOX(&forward<OnCuda>));
    library.impl("add_relu_backward", TORCH_BOX(&backward<OnCuda>));
}
#endif

}  // namespace fastres::bindings
