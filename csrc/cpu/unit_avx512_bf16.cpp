// AVX-512 with products of bf16.
#define FASTRES_ISA avx512_bf16
#include "cpu/unit.h"

namespace fastres::cpu {

const Kernels* avx512_bf16_kernels() {
#if defined(__AVX512BF16__)
    static constexpr Kernels kernels = avx512_bf16::unit("avx512_bf16");
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
