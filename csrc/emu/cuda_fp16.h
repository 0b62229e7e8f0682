// float16 of the emulator: storage, and its conversions (the CPU kernels' scalar ones).
#pragma once

#ifndef FASTRES_ISA
#define FASTRES_ISA scalar
#endif
#include "cpu/vec.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    return fastres::cpu::scalar::to_real(fastres::cpu::scalar::f16{value.bits});
}
inline __half __float2half_rn(float value) {
    fastres::cpu::scalar::f16 stored;
    fastres::cpu::scalar::from_real(value, stored);
    return {stored.bits};
}
