// Where windows lie, and which of their pixels was the largest.
#pragma once

#include <cstring>

#include "core/max_pool.h"
#include "cuda/storage.cuh"

namespace fastres::cuda {

// The index of `width` neighbouring channels.
template <int width>
struct Taps {
    uint8_t value[width];

    __device__ __forceinline__ void load(const uint8_t* from) {
        if constexpr (width == 8) {
            const uint2 raw = *reinterpret_cast<const uint2*>(from);
            memcpy(value, &raw, sizeof raw);
        } else if constexpr (width == 4) {
            const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
            memcpy(value, &raw, sizeof raw);
        } else {
            value[0] = *from;
        }
    }
    __device__ __forceinline__ void store(uint8_t* to) const {
        if constexpr (width == 8) {
            uint2 raw;
            memcpy(&raw, value, sizeof raw);
            *reinterpret_cast<uint2*>(to) = raw;
        } else if constexpr (width == 4) {
            uint32_t raw;
            memcpy(&raw, value, sizeof raw);
            *reinterpret_cast<uint32_t*>(to) = raw;
        } else {
            *to = value[0];
        }
    }
};

struct Place {
    int64_t image;
    int row, column, channel;
};

// Of an element of channels-last images of `size` pixels. A division of 32 bits takes a fifth of the
// instructions of one of 64.
__device__ __forceinline__ Place place_of(int64_t element, Axes size, int64_t channels) {
    if (element <= INT32_MAX) {
        const uint32_t at = static_cast<uint32_t>(element), c = static_cast<uint32_t>(channels);
        const uint32_t w = static_cast<uint32_t>(size.w), h = static_cast<uint32_t>(size.h);
        const uint32_t pixel = at / c, row = pixel / w, image = row / h;
        return {image, static_cast<int>(row - image * h), static_cast<int>(pixel - row * w),
                static_cast<int>(at - pixel * c)};
    }
    const int64_t pixel = element / channels, row = pixel / size.w, image = row / size.h;
    return {image, static_cast<int>(row - image * size.h), static_cast<int>(pixel - row * size.w),
            static_cast<int>(element - pixel * channels)};
}

}  // namespace fastres::cuda
