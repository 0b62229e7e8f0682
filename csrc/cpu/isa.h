// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastres::cpu {

// The units that this build holds and this processor can run, slowest first; the scalar one always.
const std::vector<Kernels>& available_kernels();

// Their names.
std::vector<std::string> available_isas();

// The unit in use: the fastest available one as measured at its first use, or what FASTRES_CPU_ISA or
// select_isa() asked for.
const Kernels& kernels();

// The convolutions in use, or null: there are none for this dtype, or PyTorch's are faster.
const ConvKernels* convolution_kernels(Dtype dtype);

// Those of the narrowest block that so many output channels fit into, or of the widest one.
const ConvKernels& fitting(const ConvKernels& kernels, int64_t channels);

// Lanes of a vector.
int lanes_of(const ConvKernels& kernels);

// Vectors of a tile that hold so many channels, or all of a block.
int vectors_of(const ConvKernels& kernels, int64_t channels);

// Throws std::invalid_argument, naming the choices, where `isa` is not available here.
void select_isa(const std::string& isa);

}  // namespace fastres::cpu
