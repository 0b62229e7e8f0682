// The loops of convolutions. CMakeLists.txt compiles this file once for each instruction set, FASTRES_ISA,
// but for the scalar one: with vectors so short, PyTorch's convolutions are the faster ones.
#include "cpu/conv_group_loops.h"
#include "cpu/conv_load.h"
#include "cpu/conv_multiply.h"
#include "cpu/conv_store.h"
#include "cpu/conv_transform.h"
#include "cpu/conv_weights.h"
#include "cpu/kernels.h"
#if defined(__AMX_BF16__)
#include "cpu/conv_load_steps.h"
#include "cpu/conv_multiply_amx.h"
#endif

namespace fastres::cpu::FASTRES_ISA {
namespace {

// The tile that fills the registers of the instruction set.
#if defined(__AVX512F__)
constexpr int kTileRows = 7, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

template <class Words, class T>
constexpr ConvKernels make_kernels() {
    constexpr int block = kTileVectors * kLanes<float>;
    ConvKernels kernels = {Words::pack,
                           block,
                           kTileVectors,
                           kTileRows,
                           /*row_grain=*/1,
                           multiply<Words, kTileRows, kTileVectors>,
                           load_channels<Words, T>,
                           load_pixels<Words, T>,
                           /*load_steps=*/nullptr,
                           pack_weight<Words, block>,
                           unpack_weight,
                           store_tile<T>,
                           kGroupRows,
                           multiply_groups<Words, kGroupRows, block>,
                           multiply_group_pixels<Words>,
                           transform<InputMap>,
                           transform<WeightMap>,
                           transform<OutputMap>,
                           transform<OutputGradMap>,
                           transform<WeightGradMap>,
                           /*release=*/nullptr};
#if defined(__AMX_BF16__)
    if constexpr (Words::pack == 2) {
        kernels.tile_rows = kAmxRows;
        kernels.row_grain = kAmxSide;
        kernels.multiply = multiply_amx<block>;
        kernels.load_steps = load_steps<Words, T>;
        kernels.release = release_tiles;
    }
#endif
    return kernels;
}

template <class Words, class T>
constexpr ConvKernels kKernels = make_kernels<Words, T>();

}  // namespace

#if defined(__AVX512BF16__)
constexpr ByDtype<ConvKernels> convolution = {nullptr, &kKernels<PairWords, bf16>, nullptr, nullptr};
#else
constexpr ByDtype<ConvKernels> convolution = {&kKernels<FloatWords, float>, &kKernels<FloatWords, bf16>,
                                              &kKernels<FloatWords, f16>, nullptr};
#endif

}  // namespace fastres::cpu::FASTRES_ISA
