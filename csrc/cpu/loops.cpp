// The loops of all layers but convolutions. CMakeLists.txt compiles this file once for each instruction
// set, FASTRES_ISA.
#include "cpu/add_relu_loops.h"
#include "cpu/batch_norm_loops.h"
#include "cpu/kernels.h"
#include "cpu/max_pool_loops.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

template <class T>
constexpr Loops kLoops = {
    {shifted_sums<T, RowTiles>, apply<T, Rows>, reduce<T, Rows, RowTiles>, input_grad<T, Rows>},
    {shifted_sums<T, Plane>, apply<T, Plane>, reduce<T, Plane, Plane>, input_grad<T, Plane>},
    {add_relu<T>, add_relu_grad<T>},
    {max_pool<T>, max_pool_grad<T>}};

}  // namespace

#if defined(__AVX512BF16__)
constexpr ByDtype<Loops> loops = {nullptr, &kLoops<bf16>, nullptr, nullptr};
#elif defined(__AVX2__)
constexpr ByDtype<Loops> loops = {&kLoops<float>, &kLoops<bf16>, &kLoops<f16>, nullptr};
#else
constexpr ByDtype<Loops> loops = {&kLoops<float>, &kLoops<bf16>, &kLoops<f16>, &kLoops<double>};
#endif

}  // namespace fastres::cpu::FASTRES_ISA
