// The maximum over windows, as it comes as an op's arguments.
#pragma once

#include "bindings/tensor.h"
#include "core/max_pool.h"

namespace fastres::bindings {

// Over images of `in` pixels; fails in the name of `op` where the kernels do not know it.
MaxPool2d max_pool2d(const char* op, int64_t batch, Axes in, const Ints& output_size, const Ints& kernel,
                     const Ints& stride, const Ints& padding);

}  // namespace fastres::bindings
