// bfloat16 of the emulator: storage, and its conversions.
#pragma once

#include "emu/cuda_fp16.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    return fastres::cpu::scalar::to_real(fastres::cpu::scalar::bf16{value.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    fastres::cpu::scalar::bf16 stored;
    fastres::cpu::scalar::from_real(value, stored);
    return {stored.bits};
}
