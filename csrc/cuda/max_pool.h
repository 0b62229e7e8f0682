// Batch norm, ReLU and the maximum over windows behind them on CUDA; as of cuda/batch_norm.h.
//
// Passes over memory. Forward, training: input twice (the second time from the caches where windows
// overlap), output and index once; evaluation: each once. Backward, training: input twice, grad and index
// as often as windows overlap, from the caches but for twice; grad_input once.
#pragma once

#include "core/max_pool.h"
#include "cuda/stream.h"

namespace fastres::cuda {

// The workspace is that of batch_norm for the input's shape.
void bn_max_pool(const BnMaxPoolForward& args, void* workspace, Stream stream);
void bn_max_pool_backward(const BnMaxPoolBackward& args, void* workspace, Stream stream);

}  // namespace fastres::cuda
