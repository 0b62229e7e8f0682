// The emulator's meaning of csrc/cuda/tensor_core.cuh. A sum's products are added one after the other in
// float, which the hardware does in an order and with roundings of its own.
#pragma once

#include "cuda/storage.cuh"
#include "cuda_runtime.h"

namespace fastres::cuda {

// What `lane` of the calling thread's warp brings; each lane calls it with one of its own.
template <class T>
T value_of_lane(T value, int lane, const char* file, int line) {
    emu::exchange(&value, sizeof value, lane, file, line);
    return value;
}

template <bool transposed>
void load_matrices(uint32_t (&matrices)[4], const void* shared_row, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    emu::check_alignment(shared_row, 16);
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const int along = 2 * (lane % 4) + i, across = lane / 4;
            const int row = transposed ? along : across, column = transposed ? across : along;
            const void* begin = value_of_lane(shared_row, 8 * m + row, file, line);
            pair[i] = static_cast<const uint16_t*>(begin)[column];
        }
        std::memcpy(&matrices[m], pair, sizeof pair);
    }
    emu::sync_warp(file, line);  // the rows are read before anybody goes on
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    struct OfA {
        uint32_t word[4];
    };
    struct OfB {
        uint32_t word[2];
    };
    OfA own_a;
    OfB own_b;
    std::memcpy(&own_a, a, sizeof own_a);
    std::memcpy(&own_b, b, sizeof own_b);
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = 2 * (lane % 4);
    OfA rows[4];  // the calling thread's two of a, as the four lanes of a row hold them
    for (int i = 0; i < 4; ++i) rows[i] = value_of_lane(own_a, 4 * row + i, file, line);
    for (int j = 0; j < 2; ++j) {
        OfB columns[4];
        for (int i = 0; i < 4; ++i) columns[i] = value_of_lane(own_b, 4 * (column + j) + i, file, line);
        for (int half = 0; half < 2; ++half) {  // row, then 8 + row
            float& sum = sums[2 * half + j];
            for (int k = 0; k < 16; ++k) {
                const int holder = k % 8 / 2, shift = k % 2 * 16;
                const uint32_t x = rows[holder].word[2 * (k / 8) + half], y = columns[holder].word[k / 8];
                sum += widen(T{static_cast<uint16_t>(x >> shift)}) *
                       widen(T{static_cast<uint16_t>(y >> shift)});
            }
        }
    }
}

}  // namespace fastres::cuda
