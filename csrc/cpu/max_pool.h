// Batch norm, ReLU and the maximum over windows behind them: the activation between them stays in a core's
// own cache, and so does its gradient.
#pragma once

#include "core/max_pool.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

void bn_max_pool(const BnMaxPoolForward& args, const ThreadPool& threads);
void bn_max_pool_backward(const BnMaxPoolBackward& args, const ThreadPool& threads);

}  // namespace fastres::cpu
