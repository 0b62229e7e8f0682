#include "cuda/batch_norm_backward.cuh"

namespace fastres::cuda {

template void batch_norm_backward_in<false>(const BnBackward&, void*, Stream);

}  // namespace fastres::cuda
