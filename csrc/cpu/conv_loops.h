// The inner loops of the convolutions for the instruction set that the unit is compiled with.
#pragma once

#include "cpu/conv_load.h"
#include "cpu/conv_multiply.h"
#include "cpu/conv_store.h"
#include "cpu/conv_transform.h"
#include "cpu/conv_weights.h"

namespace fastres::cpu::FASTRES_ISA {

// The tile that fills the registers of the instruction set.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 7, kTileVectors = 4;
#else
inline constexpr int kTileRows = 6, kTileVectors = 2;
#endif

template <class Words, class T>
constexpr ConvKernels conv_kernels() {
    constexpr int block = kTileVectors * kLanes<float>;
    return {Words::pack,
            block,
            kTileVectors,
            kTileRows,
            multiply<Words, kTileRows, kTileVectors>,
            load_channels<Words, T>,
            load_pixels<Words, T>,
            pack_weight<Words, block>,
            unpack_weight,
            store_tile<T>,
            transform<InputMap>,
            transform<WeightMap>,
            transform<OutputMap>,
            transform<OutputGradMap>,
            transform<WeightGradMap>};
}

}  // namespace fastres::cpu::FASTRES_ISA
