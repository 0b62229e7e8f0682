// Fused batch normalisation on the CPU: splits the work between threads, merges their statistics.
//
// Channels last: the rows are split, statistics are merged in the order of the tasks. Contiguous: the
// channels are split, and a channel's second pass finds it in the cache. Results depend on the number of
// threads, never on their timing.
#pragma once

#include "core/batch_norm.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

void batch_norm(const BnForward& args, const ThreadPool& pool);
void batch_norm_backward(const BnBackward& args, const ThreadPool& pool);
void add_relu(const AddRelu& args, const ThreadPool& pool);
void add_relu_backward(const AddReluBackward& args, const ThreadPool& pool);

}  // namespace fastres::cpu
