#define FASTRES_ISA avx2
#include "cpu/unit.h"

namespace fastres::cpu {

const Kernels* avx2_kernels() {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    static constexpr Kernels kernels = avx2::unit("avx2");
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
