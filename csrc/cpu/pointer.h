// Elements of a tensor whose type is known at run time.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastres::cpu {

inline const void* at(const void* base, int64_t element, Dtype dtype) {
    return base ? static_cast<const char*>(base) + element * size_of(dtype) : nullptr;
}
inline void* at(void* base, int64_t element, Dtype dtype) {
    return base ? static_cast<char*>(base) + element * size_of(dtype) : nullptr;
}

}  // namespace fastres::cpu
