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

// The tiles that fill the registers of the instruction set, by their vectors. Fewer output channels than a
// vector has lanes, or two, leave most of the usual tile's registers unused: a layer of 16 then takes 0.84x
// the time by a tile of its own.
#if defined(__AVX512F__)
constexpr int kRows[] = {0, 16, 14, 0, 7}, kNarrowest = 1, kWidest = 4;
#else
constexpr int kRows[] = {0, 0, 6}, kNarrowest = 2, kWidest = 2;
#endif

template <class Words, class T, int vectors>
constexpr ConvKernels make_kernels();

template <class Words, class T, int vectors = kWidest>
constexpr ConvKernels kKernels = make_kernels<Words, T, vectors>();

template <class Words, class T, int vectors>
constexpr ConvKernels make_kernels() {
    constexpr int block = vectors * kLanes<float>, rows = kRows[vectors];
    // Of the widest tile the last block of channels may leave some unused.
    constexpr int fewest = vectors == kWidest ? 1 : vectors;
    ConvKernels kernels = {Words::pack,
                           block,
                           vectors,
                           rows,
                           /*row_grain=*/1,
                           multiply<Words, rows, vectors, fewest>,
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
        return kernels;
    }
#endif
    if constexpr (vectors > kNarrowest) kernels.narrower = &kKernels<Words, T, vectors / 2>;
    return kernels;
}

}  // namespace

#if defined(__AVX512BF16__)
constexpr ByDtype<ConvKernels> convolution = {nullptr, &kKernels<PairWords, bf16>, nullptr, nullptr};
#else
constexpr ByDtype<ConvKernels> convolution = {&kKernels<FloatWords, float>, &kKernels<FloatWords, bf16>,
                                              &kKernels<FloatWords, f16>, nullptr};
#endif

}  // namespace fastres::cpu::FASTRES_ISA
