// Tiles of bf16 products: what they change of the unit of AVX-512 with products of bf16.
#define FASTRES_ISA avx512_amx
#include "cpu/unit.h"

namespace fastres::cpu {

const Bf16Kernels* avx512_amx_changes() {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
    using namespace avx512_amx;
    static constexpr Bf16Kernels kernels = {nullptr, convolution_of<PairWords, bf16>()};
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace fastres::cpu
