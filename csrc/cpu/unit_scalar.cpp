// The baseline of the processor family: SSE2 on x86-64, NEON on Arm.
#define FASTRES_ISA scalar
#include "cpu/unit.h"

namespace fastres::cpu {

const Kernels* scalar_kernels() {
    static constexpr Kernels kernels = scalar::unit("scalar");
    return &kernels;
}

}  // namespace fastres::cpu
