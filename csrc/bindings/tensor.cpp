#include "bindings/tensor.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/memory_pool.h"

// Since PyTorch 2.11; before, all tensors are malloc's.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fastres::bindings {
namespace {

using torch::headeronly::ScalarType;

std::optional<Dtype> to_dtype(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return Dtype::f32;
        case ScalarType::BFloat16:
            return Dtype::bf16;
        case ScalarType::Half:
            return Dtype::f16;
        case ScalarType::Double:
            return Dtype::f64;
        default:
            return std::nullopt;
    }
}

ScalarType to_scalar_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::f32:
            return ScalarType::Float;
        case Dtype::bf16:
            return ScalarType::BFloat16;
        case Dtype::f16:
            return ScalarType::Half;
        case Dtype::f64:
            return ScalarType::Double;
    }
    return ScalarType::Undefined;
}

std::string shape_text(const Tensor& tensor) {
    std::string text;
    for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
}

// Whether memory is walked in the order of `dims` (outermost first) without gaps. Dimensions of size 1 have
// no say.
bool is_dense(const Tensor& tensor, const int64_t* dims, int64_t count) {
    int64_t expected = 1;
    for (int64_t i = count - 1; i >= 0; --i) {
        if (tensor.size(dims[i]) == 1) continue;
        if (tensor.stride(dims[i]) != expected) return false;
        expected *= tensor.size(dims[i]);
    }
    return true;
}

constexpr int64_t kMaxDims = 5;

bool is_dense_contiguous(const Tensor& tensor) {
    constexpr int64_t order[kMaxDims] = {0, 1, 2, 3, 4};
    return is_dense(tensor, order, tensor.dim());
}

Tensor empty(const Tensor& input, int64_t elements, ScalarType type) {
    const int64_t size[1] = {elements};
    return torch::stable::empty({size, 1}, type, std::nullopt, input.device());
}

std::atomic<bool> keeps_memory{[] {
    const char* const wish = std::getenv("FASTRES_KEEP_MEMORY");
    return !(wish && std::string(wish) == "off");
}()};

// A dense tensor in memory of the pool, if there is any.
std::optional<Tensor> from_pool(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type,
                                int64_t bytes) {
    if (!keeps_memory || !torch_from_blob) return std::nullopt;
    void* const block = cpu::MemoryPool::instance().take(bytes);
    if (!block) return std::nullopt;  // malloc will say what there is to say
    const auto give_back = [](void* data, void*) { cpu::MemoryPool::instance().give_back(data); };
    AtenTensorHandle handle = nullptr;
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    TORCH_ERROR_CODE_CHECK(torch_from_blob(block, dims, sizes, strides, 0, dtype,
                                           aoti_torch_device_type_cpu(), /*device_index=*/-1, &handle,
                                           aoti_torch_layout_strided(), nullptr, 0, give_back, nullptr));
    return Tensor(handle);
}

void check_channels(const char* op, const char* argument, const Tensor& tensor, const Tensor& input,
                    int64_t channels) {
    if (tensor.dim() != 1 || tensor.size(0) != channels)
        fail(op, std::string(argument) + " has shape " + shape_text(tensor) + ", expected [" +
                     std::to_string(channels) + "] (one value a channel)");
    if (!same_device(tensor, input)) fail(op, std::string(argument) + " is not on the device of input");
    if (channels > 1 && tensor.stride(0) != 1)
        fail(op, std::string(argument) + " is strided; expected dense memory");
    check_memory(op, argument, tensor);
}

}  // namespace

bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

Axes axes(const char* op, const char* argument, const Ints& values, int64_t least) {
    if (values.size() != 2 || values[0] < least || values[1] < least)
        fail(op, std::string(argument) + " takes two integers of at least " + std::to_string(least));
    return {values[0], values[1]};
}

Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor) {
    if (const auto dtype = to_dtype(tensor.scalar_type())) return *dtype;
    fail(op,
         std::string(argument) + " has an unsupported dtype; takes float32, bfloat16, float16 or float64");
}

bool is_channels_last(const Tensor& tensor) {
    int64_t order[kMaxDims] = {0};
    for (int64_t i = 2; i < tensor.dim(); ++i) order[i - 1] = i;
    order[tensor.dim() - 1] = 1;
    return is_dense(tensor, order, tensor.dim());
}

void fail(const char* op, const std::string& message) {
    throw std::runtime_error("fastres::" + std::string(op) + ": " + message);
}

Activation activation(const char* op, const char* argument, const Tensor& tensor) {
    const int64_t dims = tensor.dim();
    if (dims < 2 || dims > kMaxDims)
        fail(op,
             std::string(argument) + " has shape " + shape_text(tensor) + ", expected 2 to 5 dimensions");
    if (tensor.numel() == 0)
        fail(op, std::string(argument) + " has shape " + shape_text(tensor) + ", which is empty");
    Activation shape{};
    shape.batch = tensor.size(0);
    shape.channels = tensor.size(1);
    shape.pixels = tensor.numel() / (shape.batch * shape.channels);
    shape.dtype = dtype_of(op, argument, tensor);
    shape.channels_last = is_channels_last(tensor);
    if (!shape.channels_last && !is_dense_contiguous(tensor))
        fail(op, std::string(argument) + " is strided; expected contiguous or channels_last memory");
    check_memory(op, argument, tensor);
    return shape;
}

void check_memory(const char* op, const char* argument, const Tensor& tensor) {
    int64_t bytes = 0, last = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &last));
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    if (tensor.numel() > 0 && (last + 1) * static_cast<int64_t>(tensor.element_size()) > bytes)
        fail(op, std::string(argument) + " has no memory: its storage was resized, as for offloading it");
}

void check_like_input(const char* op, const char* argument, const Tensor& tensor, const Tensor& input) {
    if (!same_device(tensor, input)) fail(op, std::string(argument) + " is not on the device of input");
    bool same_shape = tensor.dim() == input.dim();
    for (int64_t i = 0; same_shape && i < input.dim(); ++i) same_shape = tensor.size(i) == input.size(i);
    if (!same_shape)
        fail(op, std::string(argument) + " has shape " + shape_text(tensor) + ", expected " +
                     shape_text(input) + " (the shape of input)");
    if (tensor.scalar_type() != input.scalar_type())
        fail(op, std::string(argument) + " differs from input in dtype");
    for (int64_t i = 0; i < input.dim(); ++i)
        if (input.size(i) != 1 && tensor.stride(i) != input.stride(i))
            fail(op, std::string(argument) + " differs from input in memory layout");
    check_memory(op, argument, tensor);
}

ChannelVector channel_vector(const char* op, const char* argument, const OptionalTensor& tensor,
                             const Tensor& input) {
    return channel_vector(op, argument, tensor, input, input.size(1));
}

ChannelVector channel_vector(const char* op, const char* argument, const OptionalTensor& tensor,
                             const Tensor& input, int64_t channels) {
    if (!tensor) return {};
    check_channels(op, argument, *tensor, input, channels);
    const Dtype dtype = dtype_of(op, argument, *tensor);
    const Dtype input_dtype = dtype_of(op, "input", input);
    if (dtype != input_dtype && dtype != accumulation_dtype(input_dtype))
        fail(op, std::string(argument) + " is " + name(dtype) + ", expected " + name(input_dtype) + " or " +
                     name(accumulation_dtype(input_dtype)) + " for an input of " + name(input_dtype));
    return {tensor->data_ptr(), dtype};
}

void check_statistics(const char* op, const char* argument, const Tensor& tensor, const Tensor& input,
                      Dtype dtype) {
    check_channels(op, argument, tensor, input, input.size(1));
    const Dtype actual = dtype_of(op, argument, tensor);
    if (actual != dtype)
        fail(op, std::string(argument) + " is " + name(actual) + ", expected " + name(dtype));
}

Tensor output_like(const Tensor& input) {
    const int64_t bytes = input.numel() * static_cast<int64_t>(input.element_size());
    const bool pooled_strides = is_channels_last(input) || is_dense_contiguous(input);
    if (input.is_cpu() && bytes >= cpu::MemoryPool::least && pooled_strides)
        if (auto pooled = from_pool(input.sizes().data(), input.strides().data(), input.dim(),
                                    input.scalar_type(), bytes))
            return *pooled;
    return torch::stable::empty_like(input);
}

Tensor empty_channels_last(const Tensor& like, const Ints& size) {
    const int64_t c = size[1], h = size[2], w = size[3];
    const int64_t strides[4] = {c * h * w, 1, c * w, c};
    const int64_t bytes = size[0] * c * h * w * static_cast<int64_t>(like.element_size());
    if (like.is_cpu() && bytes >= cpu::MemoryPool::least)
        if (auto pooled = from_pool(size.data(), strides, 4, like.scalar_type(), bytes)) return *pooled;
    return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                torch::headeronly::MemoryFormat::ChannelsLast);
}

bool keep_memory(bool keep) {
    const bool before = keeps_memory;
    keeps_memory = keep;
    return before;
}

Tensor empty_values(const Tensor& input, int64_t count, Dtype dtype) {
    return empty(input, count, to_scalar_type(dtype));
}

Tensor empty_channels(const Tensor& input, Dtype dtype) {
    return empty_values(input, input.size(1), dtype);
}

Tensor empty_bytes(const Tensor& input, int64_t bytes) {
    return empty(input, bytes, ScalarType::Byte);
}

Tensor nothing(const Tensor& input) {
    return empty(input, 0, input.scalar_type());
}

}  // namespace fastres::bindings
