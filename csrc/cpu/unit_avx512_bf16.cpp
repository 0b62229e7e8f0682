// AVX-512 with products of bf16: what they change of the unit without them.
#define FASTRES_ISA avx512_bf16
#include "cpu/unit.h"

namespace fastres::cpu {

const Bf16Kernels* avx512_bf16_changes() {
#if defined(__AVX512BF16__)
    using namespace avx512_bf16;
    static constexpr Kernels::Loops loops = loops_of<bf16>();
    static constexpr Bf16Kernels kernels = {&loops, convolution_of<PairWords, bf16>()};
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
