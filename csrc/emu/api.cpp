// The emulator's C interface: csrc/cuda's entry points with host pointers. Each returns null, or what went
// wrong, valid until the next call.
#include <exception>
#include <string>

#include "cuda/add_relu.h"
#include "cuda/batch_norm.h"
#include "cuda/kernel_list.h"
#include "cuda/max_pool.h"
#include "cuda_runtime.h"
#include "emu/block.h"

namespace {

std::string message;
const auto kStream = reinterpret_cast<cudaStream_t>(8);  // none of the system's own

template <class Body>
const char* guarded(const Body& body) {
    fastres::emu::callers_stream = kStream;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace

extern "C" {

int64_t fastres_emu_batch_norm_workspace_bytes(const fastres::Activation* shape) {
    return fastres::cuda::batch_norm_workspace_bytes(*shape);
}
const char* fastres_emu_batch_norm(const fastres::BnForward* args, void* workspace) {
    return guarded([&] { fastres::cuda::batch_norm(*args, workspace, kStream); });
}
const char* fastres_emu_batch_norm_backward(const fastres::BnBackward* args, void* workspace) {
    return guarded([&] { fastres::cuda::batch_norm_backward(*args, workspace, kStream); });
}
const char* fastres_emu_bn_max_pool(const fastres::BnMaxPoolForward* args, void* workspace) {
    return guarded([&] { fastres::cuda::bn_max_pool(*args, workspace, kStream); });
}
const char* fastres_emu_bn_max_pool_backward(const fastres::BnMaxPoolBackward* args, void* workspace) {
    return guarded([&] { fastres::cuda::bn_max_pool_backward(*args, workspace, kStream); });
}
const char* fastres_emu_add_relu(const fastres::AddRelu* args) {
    return guarded([&] { fastres::cuda::add_relu(*args, kStream); });
}
const char* fastres_emu_add_relu_backward(const fastres::AddReluBackward* args) {
    return guarded([&] { fastres::cuda::add_relu_backward(*args, kStream); });
}
const char* fastres_emu_use_on_chip(int blocks_a_multiprocessor) {
    return guarded([&] { fastres::cuda::use_on_chip(blocks_a_multiprocessor); });
}
void fastres_emu_overlap_launches(int overlap) {
    fastres::cuda::overlap_launches(overlap != 0);
}
void fastres_emu_set_schedule(int descending) {
    fastres::emu::set_schedule(descending != 0);
}

}  // extern "C"
