#include <stdexcept>

#include "cuda/batch_norm_backward.cuh"

namespace fastres::cuda {

template void batch_norm_backward_in<true>(const BnBackward&, void*, Stream);

void batch_norm_backward(const BnBackward& args, void* workspace, Stream stream) {
    check_dtype(args.weight, "weight");
    check_dtype(args.bias, "bias");
    if (args.training && args.relu && args.output && !args.grad_residual)
        throw std::invalid_argument(
            "fastres::batch_norm_backward: grad_residual is null, expected memory for the masked gradient, "
            "as output is given");
    args.shape.channels_last ? batch_norm_backward_in<true>(args, workspace, stream)
                             : batch_norm_backward_in<false>(args, workspace, stream);
}

}  // namespace fastres::cuda
