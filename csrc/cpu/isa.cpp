#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastres::cpu {
namespace {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available{scalar_kernels()};
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2_kernels() && avx2) available.push_back(avx2_kernels());
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512_kernels() && avx2 && avx512) available.push_back(avx512_kernels());
#endif
    return available;
}

const Kernels* find(const std::string& isa) {
    for (const Kernels* candidate : available_kernels())
        if (isa == candidate->isa) return candidate;
    std::string choices;
    for (const Kernels* candidate : available_kernels())
        choices += (choices.empty() ? "" : ", ") + std::string(candidate->isa);
    throw std::invalid_argument("FASTRES_CPU_ISA: '" + isa +
                                "' cannot run on this machine, which has: " + choices);
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> chosen{[] {
        const char* forced = std::getenv("FASTRES_CPU_ISA");
        return forced && *forced ? find(forced) : available_kernels().back();
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

void select_isa(const std::string& isa) {
    current().store(find(isa), std::memory_order_relaxed);
}

}  // namespace fastres::cpu
