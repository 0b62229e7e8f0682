// AVX-512 with products of bf16, and of tiles of them in convolutions.
#define FASTRES_ISA avx512_amx
#include "cpu/unit.h"

namespace fastres::cpu {

const Kernels* avx512_amx_kernels() {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
    static constexpr Kernels kernels = avx512_amx::unit("avx512_amx");
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
