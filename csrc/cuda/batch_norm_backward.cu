#include <stdexcept>

#include "cuda/batch_norm_backward.cuh"

namespace fastres::cuda {

void batch_norm_backward(const BnBackward& args, void* workspace, Stream stream) {
    check_dtype(args.weight, "weight");
    check_dtype(args.bias, "bias");
    if (args.training && args.relu && args.output && !args.grad_residual)
        throw std::invalid_argument(
            "fastres::batch_norm_backward: grad_residual is null, expected memory for the masked gradient, "
            "as output "
            "is given");
    const bool vectors = fills_vectors(args.shape) && vector_aligned({args.grad, args.input, args.output,
                                                                      args.grad_input, args.grad_residual});
    with_access(args.shape.dtype, vectors, [&](auto access) {
        using A = decltype(access);
        using T = typename A::Element;
        if (args.shape.channels == 0 || batch_norm_backward_on_chip(args, workspace, stream)) return;
        const bool masked = args.grad_residual != nullptr;
        const StoredGrad<T> grad{static_cast<const T*>(args.grad)};
        const StoredGrad<T> after{static_cast<const T*>(masked ? args.grad_residual : args.grad)};
        args.shape.channels_last ? run<A, true>(args, grad, after, masked, workspace, stream)
                                 : run<A, false>(args, grad, after, masked, workspace, stream);
    });
}

}  // namespace fastres::cuda
