#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

namespace fastres::cpu {
namespace {

// Whether the processor has tiles of bf16, and the system lets this process use them: Linux wants to be
// asked, for it has to save 8 KiB more of each thread that does.
bool amx_is_usable() {
#if defined(FASTRES_EMULATE_AMX)
    return true;
#elif defined(__x86_64__) && defined(__linux__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned os_saves_state = 1u << 27;                // of ecx, in leaf 1
    constexpr unsigned bf16_and_tiles = 1u << 22 | 1u << 24;     // of edx, in leaf 7
    constexpr unsigned saved_tiles = 1u << 17 | 1u << 18;        // of the state that the system saves
    constexpr long request_permission = 0x1023, tile_data = 18;  // of arch_prctl
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & os_saves_state)) return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & bf16_and_tiles) != bf16_and_tiles)
        return false;
    unsigned saved = 0, upper = 0;
    asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    return (saved & saved_tiles) == saved_tiles &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool has_amx() {
    static const bool usable = amx_is_usable();
    return usable;
}

Kernels changed(const Kernels& from, const char* isa, const Bf16Kernels& by) {
    constexpr int bf16 = static_cast<int>(Dtype::bf16);
    Kernels kernels = from;
    kernels.isa = isa;
    if (by.loops) kernels.loops[bf16] = *by.loops;
    kernels.convolution[bf16] = by.convolution;
    return kernels;
}

const Kernels* avx512_bf16_kernels() {
    if (!avx512_kernels() || !avx512_bf16_changes()) return nullptr;
    static const Kernels kernels = changed(*avx512_kernels(), "avx512_bf16", *avx512_bf16_changes());
    return &kernels;
}

const Kernels* avx512_amx_kernels() {
    if (!avx512_bf16_kernels() || !avx512_amx_changes()) return nullptr;
    static const Kernels kernels = changed(*avx512_bf16_kernels(), "avx512_amx", *avx512_amx_changes());
    return &kernels;
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available{scalar_kernels()};
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2_kernels() && avx2) available.push_back(avx2_kernels());
#if defined(FASTRES_EMULATE_AVX512)
    const bool avx512 = avx2, avx512_bf16 = avx2;
#else
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    if (avx512_kernels() && avx512) available.push_back(avx512_kernels());
    if (avx512_bf16_kernels() && avx512_bf16) available.push_back(avx512_bf16_kernels());
    if (avx512_amx_kernels() && avx512_bf16 && has_amx()) available.push_back(avx512_amx_kernels());
#endif
    return available;
}

namespace {

const Kernels* find(const std::string& isa) {
    for (const Kernels* candidate : available_kernels())
        if (isa == candidate->isa) return candidate;
    std::string choices;
    for (const Kernels* candidate : available_kernels())
        choices += (choices.empty() ? "" : ", ") + std::string(candidate->isa);
    throw std::invalid_argument("FASTRES_CPU_ISA: '" + isa +
                                "' cannot run on this machine, which has: " + choices);
}

// Seconds of so many products of a unit's own kind, the fewest of some attempts.
double seconds_of_products(const ConvKernels& unit) {
    constexpr int64_t steps = 256;
    const int64_t block = unit.block, rows = unit.tile_rows;
    std::vector<float> a(rows * steps), b(steps * block), sums(rows * block);
    const int64_t run = 0;
    const MultiplyTile tile{a.data(),     steps,    1,           &run,  1,
                            steps,        b.data(), sums.data(), block, unit.tile_rows,
                            unit.vectors, false};
    double least = 1;
    for (int attempt = 0; attempt < 8; ++attempt) {
        const auto begin = std::chrono::steady_clock::now();
        unit.multiply(tile);
        least = std::min(least,
                         std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return least;
}

// On some processors a product of bf16 pairs takes longer than the two products of floats that it replaces.
bool pairs_pay(const Kernels& pairs, const Kernels& floats) {
    constexpr int bf16 = static_cast<int>(Dtype::bf16);
    return seconds_of_products(*pairs.convolution[bf16]) <
           2 * seconds_of_products(*floats.convolution[bf16]);
}

const Kernels* fastest() {
    const std::vector<const Kernels*> available = available_kernels();
    const Kernels* last = available.back();
    if (last == avx512_bf16_kernels() && !pairs_pay(*last, *avx512_kernels())) return avx512_kernels();
    return last;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> chosen{[] {
        const char* forced = std::getenv("FASTRES_CPU_ISA");
        return forced && *forced ? find(forced) : fastest();
    }()};
    return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* unit : available_kernels()) names.push_back(unit->isa);
    return names;
}

const Kernels& kernels() {
    return *current().load(std::memory_order_relaxed);
}

const ConvKernels* convolution_kernels(Dtype dtype) {
    // PyTorch multiplies bf16 with AMX where that is to be had, also where our compiler had no word for it.
    static const bool amx_elsewhere = !avx512_amx_kernels() && has_amx();
    if (dtype == Dtype::bf16 && amx_elsewhere) return nullptr;
    return kernels().convolution[static_cast<int>(dtype)];
}

int lanes_of(const ConvKernels& kernels) {
    return kernels.block / kernels.vectors;
}

int vectors_of(const ConvKernels& kernels, int64_t channels) {
    const int64_t lanes = lanes_of(kernels);
    return static_cast<int>((std::min<int64_t>(channels, kernels.block) + lanes - 1) / lanes);
}

void select_isa(const std::string& isa) {
    current().store(find(isa), std::memory_order_relaxed);
}

}  // namespace fastres::cpu
