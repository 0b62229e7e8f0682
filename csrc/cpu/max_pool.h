// Batch norm, ReLU and the maximum over windows behind them: the activation between them stays in a core's
// own cache, and so does its gradient.
#pragma once

#include "core/batch_norm.h"
#include "core/max_pool.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

// maximum(act(batch_norm(input))) of channels-last images. `norm` has no residual and no output.
struct BnMaxPoolForward {
    BnForward norm;
    MaxPool2d pool;
    void* output;
    uint8_t* index;  // like output: which pixel of its window is the first largest one
};

// `norm` has no grad.
struct BnMaxPoolBackward {
    BnBackward norm;
    MaxPool2d pool;
    const void* grad;
    const uint8_t* index;
};

void bn_max_pool(const BnMaxPoolForward& args, const ThreadPool& threads);
void bn_max_pool_backward(const BnMaxPoolBackward& args, const ThreadPool& threads);

}  // namespace fastres::cpu
