// fastres._C: what is no tensor operation. How the library was built, and which kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/tensor.h"
#include "cpu/conv_groups.h"
#include "cpu/conv_winograd.h"
#include "cpu/isa.h"
#include "cpu/memory_pool.h"
#if defined(FASTRES_CUDA)
#include "cuda/batch_norm.h"
#include "cuda/kernel_list.h"
#include "cuda/stream.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = FASTRES_VERSION;
    info["compiler"] = FASTRES_COMPILER;
    info["torch"] = FASTRES_TORCH_VERSION;
    info["cuda"] = FASTRES_CUDA_VERSION;
    info["cuda_archs"] = FASTRES_CUDA_ARCHS;
    return info;
}

std::vector<std::string> kernels() {
    std::vector<std::string> names;
    const auto add = [&](const fastres::cpu::Kernels& unit, const char* kernel) {
        names.push_back(std::string("cpu/") + unit.isa + "/" + kernel);
    };
    for (const fastres::cpu::Kernels& unit : fastres::cpu::available_kernels()) {
        for (const char* kernel : {"bn_moments", "bn_apply", "bn_reduce", "bn_input_grad", "add_relu",
                                   "add_relu_grad", "max_pool", "max_pool_grad"})
            add(unit, kernel);
        if (unit.convolution[fastres::Dtype::f32])
            for (const char* kernel :
                 {"conv_multiply", "conv_load", "conv_store", "conv_pack_weight", "conv_transform"})
                add(unit, kernel);
        const fastres::cpu::ConvKernels* bf16 = unit.convolution[fastres::Dtype::bf16];
        if (bf16 && bf16->load_steps) add(unit, "conv_load_steps");
    }
#if defined(FASTRES_CUDA)
    for (const std::string& kernel : fastres::cuda::kernel_names()) names.push_back("cuda/" + kernel);
#endif
    return names;
}

void use_winograd(const std::string& where) {
    using fastres::cpu::WinogradUse;
    if (where == "faster") return fastres::cpu::use_winograd(WinogradUse::where_faster);
    if (where == "possible") return fastres::cpu::use_winograd(WinogradUse::wherever_possible);
    if (where == "never") return fastres::cpu::use_winograd(WinogradUse::never);
    throw std::invalid_argument("where is '" + where + "', expected faster, possible or never");
}

bool hold(const py::list& dicts, const py::tuple& values) {
    size_t i = 0;
    for (const py::handle dict : dicts) {
        if (!PyDict_Check(dict.ptr())) return false;
        PyObject *key = nullptr, *value = nullptr;
        for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value); ++i)
            if (i == values.size() || value != PyTuple_GET_ITEM(values.ptr(), i)) return false;
    }
    return i == values.size();
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The compiled half of fastres. Importing it registers torch.ops.fastres.*.";
    module.def("build_info", &build_info,
               "Versions of fastres, compiler, torch and CUDA that this library was built with; empty "
               "strings where "
               "CUDA is absent.");
    module.def(
        "cpu_isa", [] { return std::string(fastres::cpu::kernels().isa); },
        "The instruction set whose CPU kernels run: 'scalar', 'avx2', 'avx512', 'avx512_bf16' or "
        "'avx512_amx'.");
    module.def("cpu_isas", &fastres::cpu::available_isas,
               "The instruction sets that this library holds and this processor can run, slowest first.");
    module.def("select_cpu_isa", &fastres::cpu::select_isa, py::arg("isa"),
               "Run the CPU kernels of another instruction set from now on. Raises ValueError if it cannot "
               "run here.");
    module.def(
        "convolves",
        [](const std::string& dtype, int64_t in_channels, int64_t out_channels, int64_t groups) {
            for (int i = 0; i < fastres::kDtypes; ++i) {
                if (dtype != fastres::name(static_cast<fastres::Dtype>(i))) continue;
                const auto* kernels = fastres::cpu::convolution_kernels(static_cast<fastres::Dtype>(i));
                return kernels && fastres::cpu::covers_groups(*kernels, in_channels, out_channels, groups);
            }
            return false;
        },
        py::arg("dtype"), py::arg("in_channels") = 1, py::arg("out_channels") = 1, py::arg("groups") = 1,
        "Whether the instruction set in use has convolutions of this dtype, channels and groups.");
    module.def("use_winograd", &use_winograd, py::arg("where"),
               "Multiply 3x3 convolutions of float32 and float16 by Winograd's algorithm where that is "
               "'faster', as at first, wherever it is 'possible', or 'never'.");
#if defined(FASTRES_CUDA)
    module.def("use_on_chip", &fastres::cuda::use_on_chip, py::arg("blocks_a_multiprocessor"),
               "Train batch norms whose tensors fit into a GPU's shared memory in one launch, of 1 block a "
               "multiprocessor or of 2; or, 0 and as at first, none of them.");
    module.def("overlap_launches", &fastres::cuda::overlap_launches, py::arg("overlap"),
               "Let a CUDA kernel's blocks take their places while the last ones of the kernel ahead of it "
               "end; at first not. Of no effect before compute capability 9.0.");
#endif
    module.def(
        "keep_memory", &fastres::bindings::keep_memory, py::arg("keep"),
        "Whether large results of CPU kernels come from memory that is kept; tells whether they did.");
    module.def(
        "memory",
        [] {
            const auto bytes = fastres::cpu::MemoryPool::instance().bytes();
            return std::make_pair(bytes.in_use, bytes.idle);
        },
        "Bytes of kept memory: in use by tensors, and idle.");
    module.def(
        "release_memory", [] { fastres::cpu::MemoryPool::instance().release(); },
        "Give the idle part of the kept memory back to the system.");
    module.def("hold", &hold, py::arg("dicts"), py::arg("values"),
               "Whether the values of the dicts, one dict after the other, are these very objects.");
    module.def("kernels", &kernels, "Names of all kernels that this build can run on this machine.");
}
