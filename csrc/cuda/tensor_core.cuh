// Products of small matrices on tensor cores, and the loads that bring their operands, for whole warps.
//
// Reference: PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix", "Matrix Fragments for mma.m16n8k16
// with floating point type".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

// Four matrices of 8 rows of 8 elements of two bytes, from shared memory. Lane 8 * m + r gives the address
// of row r of matrix m, a multiple of 16. Of each matrix, a lane gets two neighbouring elements of a row:
// row lane / 4, columns 2 * (lane % 4) and the next; or `transposed`, of a column: column lane / 4, rows
// 2 * (lane % 4) and the next.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* shared_row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    if constexpr (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(address)
                     : "memory");
    }
}

// sums += a * b: 16 rows, 8 columns, 16 products each. Of a, which has the matrices {rows 0 to 7, rows 8 to
// 15} of its columns 0 to 7 and then of 8 to 15, a lane holds what load_matrices gives; of b, which has the
// matrices rows 0 to 7 and 8 to 15, what it gives of each transposed. Of the sums it holds columns
// 2 * (lane % 4) and the next of row lane / 4, and then of row 8 + lane / 4.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastres::cuda
