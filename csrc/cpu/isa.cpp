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

// Whether the processor has what a set adds to the ones before it.
#if defined(__x86_64__)
bool adds_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
#if defined(FASTRES_EMULATE_AVX512)
bool adds_avx512() {
    return adds_avx2();
}
bool adds_avx512_bf16() {
    return true;
}
#else
bool adds_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool adds_avx512_bf16() {
    return __builtin_cpu_supports("avx512bf16");
}
#endif
#endif

struct Unit {
    const char* isa;
    bool (*present)();
    const ByDtype<Loops>* loops;              // null: none of its own
    const ByDtype<ConvKernels>* convolution;  // the same
};

// Those that CMakeLists.txt compiles; each set includes the ones before it.
const Unit kUnits[] = {
    {"scalar", [] { return true; }, &scalar::loops, nullptr},
#if defined(FASTRES_UNIT_AVX2)
    {"avx2", adds_avx2, &avx2::loops, &avx2::convolution},
#endif
#if defined(FASTRES_UNIT_AVX512)
    {"avx512", adds_avx512, &avx512::loops, &avx512::convolution},
#endif
#if defined(FASTRES_UNIT_AVX512_BF16)
    {"avx512_bf16", adds_avx512_bf16, &avx512_bf16::loops, &avx512_bf16::convolution},
#endif
#if defined(FASTRES_UNIT_AVX512_AMX)
    {"avx512_amx", has_amx, nullptr, &avx512_amx::convolution},
#endif
};

template <class Table>
void take(const ByDtype<Table>* own, ByDtype<Table>& tables) {
    for (int dtype = 0; own && dtype < kDtypes; ++dtype)
        if (own->tables[dtype]) tables.tables[dtype] = own->tables[dtype];
}

std::vector<Kernels> find_available() {
    std::vector<Kernels> available;
    Kernels kernels{};
    for (const Unit& unit : kUnits) {
        if (!unit.present()) break;
        kernels.isa = unit.isa;
        take(unit.loops, kernels.loops);
        take(unit.convolution, kernels.convolution);
        available.push_back(kernels);
    }
    return available;
}

}  // namespace

const std::vector<Kernels>& available_kernels() {
    static const std::vector<Kernels> available = find_available();
    return available;
}

namespace {

const Kernels* find(const std::string& isa) {
    std::string choices;
    for (const Kernels& candidate : available_kernels()) {
        if (isa == candidate.isa) return &candidate;
        choices += (choices.empty() ? "" : ", ") + std::string(candidate.isa);
    }
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
    return seconds_of_products(*pairs.convolution[Dtype::bf16]) <
           2 * seconds_of_products(*floats.convolution[Dtype::bf16]);
}

const Kernels* fastest() {
    const Kernels* last = &available_kernels().back();
    return last->isa == std::string("avx512_bf16") && !pairs_pay(last[0], last[-1]) ? last - 1 : last;
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
    for (const Kernels& unit : available_kernels()) names.push_back(unit.isa);
    return names;
}

const Kernels& kernels() {
    return *current().load(std::memory_order_relaxed);
}

const ConvKernels* convolution_kernels(Dtype dtype) {
    // PyTorch multiplies bf16 with AMX where that is to be had, also where our compiler had no word for it.
#if !defined(FASTRES_UNIT_AVX512_AMX)
    if (dtype == Dtype::bf16 && has_amx()) return nullptr;
#endif
    return kernels().convolution[dtype];
}

const ConvKernels& fitting(const ConvKernels& kernels, int64_t channels) {
    const ConvKernels* narrower = kernels.narrower;
    return narrower && channels <= narrower->block ? fitting(*narrower, channels) : kernels;
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
