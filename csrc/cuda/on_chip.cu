#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/batch_norm.h"
#include "cuda/launch.h"
#include "cuda/on_chip.h"

namespace fastres::cuda {
namespace {

std::atomic<int> blocks_a_multiprocessor{0};

int64_t ceil_divide(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace

void use_on_chip(int blocks) {
    if (blocks < 0 || blocks > kLeastBlocks)
        throw std::invalid_argument("fastres: blocks_a_multiprocessor is " + std::to_string(blocks) +
                                    ", expected 0 to " + std::to_string(kLeastBlocks));
    blocks_a_multiprocessor = blocks;
}

std::optional<OnChip> on_chip(const Activation& shape, int width, int unroll, int tensors,
                              const AnyKernel& kernel) {
    const int a_multiprocessor = blocks_a_multiprocessor;
    if (a_multiprocessor == 0 || shape.numel() == 0) return std::nullopt;
    const Room room = room_of(kernel, a_multiprocessor);
    if (room.blocks == 0) return std::nullopt;
    OnChip found{};
    found.sweep = sweep_of(shape, width, unroll, kOnChipTileChannels / width);
    found.sweep.slices = slices_for(found.sweep.tiles, found.sweep.groups, room.blocks);
    found.blocks = std::min(found.sweep.units(), room.blocks);
    const int64_t groups = ceil_divide(found.sweep.units(), found.blocks) *
                           ceil_divide(found.sweep.groups, found.sweep.slices);
    found.dynamic_bytes = groups * tensors * unroll * kThreads * kVectorBytes;
    if (found.dynamic_bytes > room.dynamic_bytes) return std::nullopt;
    return found;
}

}  // namespace fastres::cuda
