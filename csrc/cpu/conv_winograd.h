// Where Winograd's way of multiplying is taken for 3x3 convolutions of stride 1.
#pragma once

#include <cstdint>

#include "core/conv2d.h"
#include "cpu/conv_kernels.h"

namespace fastres::cpu {

enum class WinogradUse : int { where_faster, wherever_possible, never };

// For tests and measurements; where_faster is what it is otherwise.
void use_winograd(WinogradUse where);

// Of outputs, or their gradients, of so many pixels.
bool winograd_pays(const ConvKernels& kernels, int64_t images, Axes out, int64_t in_channels,
                   int64_t out_channels, int64_t least_pixels);

}  // namespace fastres::cpu
