#define FASTRES_ISA avx512
#include "cpu/unit.h"

namespace fastres::cpu {

const Kernels* avx512_kernels() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    static constexpr Kernels kernels = avx512::unit("avx512");
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
