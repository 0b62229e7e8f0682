// A convolution and the maximum over windows behind it: what lies between them stays in a core's own cache.
#pragma once

#include "core/max_pool.h"
#include "cpu/convolution.h"

namespace fastres::cpu {

struct ConvMaxPool {
    ConvForward conv;  // has no residual, no output and no moments
    MaxPool2d pool;
    void* output;
};

void conv_max_pool(const ConvMaxPool& args, const ThreadPool& threads);

}  // namespace fastres::cpu
