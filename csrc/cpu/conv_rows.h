// The rows of an operand that a box of a convolution reads.
#pragma once

#include "core/conv2d.h"
#include "cpu/convolution.h"
#include "cpu/cut.h"
#include "cpu/pointer.h"

namespace fastres::cpu {

// Rows of an image, those of one phase modulo a stride after the other: what a row of the kernel sees for
// neighbours in the output are neighbours then.
struct RowOrder {
    int64_t span;  // rows of the image, from the first on
    int64_t stride = 1;
    int64_t phases = 1;  // the first ones of the stride's

    int64_t of_phase(int64_t phase) const { return ceil_div(span - phase, stride); }
    int64_t before(int64_t phase) const {
        int64_t rows = 0;
        for (int64_t i = 0; i < phase; ++i) rows += of_phase(i);
        return rows;
    }
    int64_t count() const { return before(phases); }
    int64_t place(int64_t row) const { return before(row % stride) + row / stride; }
};

// What so many neighbours in the output see, each of them `taps` rows of `span`. One tap skips the others.
inline RowOrder rows_seen(int64_t outputs, int64_t stride, int64_t span, int64_t taps) {
    return {(outputs - 1) * stride + span, stride, taps == 1 ? 1 : stride};
}

struct ImageRows {
    Range images;
    int64_t first;  // those outside of the image are zero
    RowOrder order;
};

// Calls load(pixels) for each row of each image, in order; `pixels` says which of a row's are wanted,
// `size` and `channels` those of the tensor.
template <class Load>
void visit_rows(const ConvOperand& operand, Dtype dtype, Axes size, int64_t channels, const ImageRows& rows,
                PixelRow pixels, const Load& load) {
    pixels.width = size.w;
    pixels.pixel_stride = channels;
    pixels.prologue = operand.prologue;
    for (int64_t image = rows.images.begin; image < rows.images.end; ++image) {
        for (int64_t phase = 0; phase < rows.order.phases; ++phase) {
            for (int64_t i = phase; i < rows.order.span; i += rows.order.stride) {
                const int64_t row = rows.first + i;
                const bool inside = row >= 0 && row < size.h;
                const int64_t element = (image * size.h + row) * size.w * channels;
                pixels.row = inside ? at(operand.data, element, dtype) : nullptr;
                pixels.input = inside ? at(operand.bn_input, element, dtype) : nullptr;
                load(pixels);
            }
        }
    }
}

// words[image][row][column][word of channels]
inline void load_rows(const ConvKernels& kernels, const ConvOperand& operand, Dtype dtype, Axes size,
                      int64_t channels, const ImageRows& rows, const PixelRow& pixels, float* words) {
    const int64_t row_words = pixels.columns * ceil_div(pixels.channels, kernels.pack);
    visit_rows(operand, dtype, size, channels, rows, pixels, [&](const PixelRow& row) {
        kernels.load_channels(row, words);
        words += row_words;
    });
}

}  // namespace fastres::cpu
