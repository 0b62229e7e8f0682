// Where a kernel runs: PyTorch's thread pool on the CPU, its current stream on a CUDA device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>

#include "cpu/parallel.h"

#if defined(FASTRES_CUDA)
#include "cuda/stream.h"

// A CPU-only torch does not define it; without this, the library would not load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace fastres::bindings {

inline cpu::ThreadPool torch_threads() {
    return {torch::stable::get_num_threads(), [](int64_t tasks, cpu::ThreadPool::Task task, void* context) {
                torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) task(context, i);
                });
            }};
}

#if defined(FASTRES_CUDA)
inline cuda::Stream current_stream(const torch::stable::Tensor& tensor) {
    if (!aoti_torch_get_current_cuda_stream)
        throw std::runtime_error("fastres: a CUDA tensor came in, but this PyTorch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cuda::Stream>(stream);
}
#endif

}  // namespace fastres::bindings
