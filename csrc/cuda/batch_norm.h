// Fused batch normalisation on CUDA: enqueues kernels on a stream of the current device, allocates nothing
// and never waits, so that a call can be captured into a CUDA graph. The same call gives the same bits.
//
// Passes over memory. Forward, training: input twice, output once; evaluation: each once. Backward,
// training: grad and input twice, grad_input once; evaluation: each once. A residual adds itself to the
// forward pass, and output and grad_residual to the first pass of the backward; the second then reads
// grad_residual in place of grad. What is read twice is read once in one launch where it fits on the chip:
// see on_chip.h.
#pragma once

#include "core/batch_norm.h"
#include "cuda/stream.h"

namespace fastres::cuda {

// Bytes of device memory that either direction needs for a call on the current device; 8-byte aligned, any
// content.
int64_t batch_norm_workspace_bytes(const Activation& shape);

// Throws std::invalid_argument for float64, std::runtime_error where a launch fails. Pointers are device
// pointers aligned to their element; outputs overlap no input. Where all are aligned to 16 bytes and the
// innermost dimension (channels, or pixels) fills whole vectors of 16 bytes, loads and stores take 16 bytes
// each.
void batch_norm(const BnForward& args, void* workspace, Stream stream);
// Its first pass alone: the batch's statistics, saved, and the running ones' update. Nothing in evaluation.
void batch_norm_statistics(const BnForward& args, void* workspace, Stream stream);

// As above. In training, args.output (a mask from the stored output) needs args.grad_residual, which
// carries the masked gradient from the first pass to the second.
void batch_norm_backward(const BnBackward& args, void* workspace, Stream stream);

// In one launch that reads each tensor once. False, and nothing is launched, where that is not possible;
// the two above begin with these.
bool batch_norm_on_chip(const BnForward& args, void* workspace, Stream stream);
bool batch_norm_backward_on_chip(const BnBackward& args, void* workspace, Stream stream);

// Blocks that such a launch has on each multiprocessor, which share its memory: 1, 2, or 0 for no such
// launch, as at first: no card has timed it, and it waits until all its blocks find room, which other
// kernels may hold (a gradient's all-reduce, say). Throws std::invalid_argument for others.
void use_on_chip(int blocks_a_multiprocessor);

}  // namespace fastres::cuda
