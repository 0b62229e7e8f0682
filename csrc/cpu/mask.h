#pragma once

namespace fastres::cpu {

// How a gradient passes an activation: unchanged, by the sign of the stored output, or by that of the
// pre-activation (input - mean) * scale + shift, recomputed.
enum class Mask : int { none = 0, from_output = 1, recomputed = 2 };

}  // namespace fastres::cpu
