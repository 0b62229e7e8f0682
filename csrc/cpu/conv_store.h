// Sums -> activations, with what is done to them on the way.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/conv_words.h"

namespace fastres::cpu::FASTRES_ISA {

// What is done with the sums on their way.
enum class Epilogue { none, moments, activation, residual_activation };

// One vector of channels, or one channel, of a tile.
template <class T, class Lane, Epilogue epilogue>
struct StoreColumn {
    static constexpr bool activates =
        epilogue == Epilogue::activation || epilogue == Epilogue::residual_activation;

    const StoreTile& tile;
    int64_t c;
    float floor;
    Lane scale, shift, about, sum, sum_of_squares;

    FASTRES_INLINE_BODY StoreColumn(const StoreTile& tile, int64_t c)
        : tile(tile),
          c(c),
          floor(tile.relu ? 0.0f : -__builtin_inff()),
          scale(Lane{} + 1.0f),
          shift{},
          about{},
          sum{},
          sum_of_squares{} {
        if constexpr (epilogue == Epilogue::moments) about = load_as<Lane>(tile.about + c);
        if constexpr (activates) {
            if (tile.scale) scale = load_as<Lane>(tile.scale + c);
            if (tile.shift) shift = load_as<Lane>(tile.shift + c);
        }
    }

    FASTRES_INLINE_BODY Lane value(int row) const {
        Lane value = load_as<Lane>(tile.sums + row * tile.sums_stride + c);
        if constexpr (activates) {
            value = value * scale + shift;
            if constexpr (epilogue == Epilogue::residual_activation)
                value += load_as<Lane>(static_cast<const T*>(tile.residual) + row * tile.row_stride + c);
            value = not_below(floor, value);
        }
        return value;
    }
    FASTRES_INLINE_BODY T* output(int row) const {
        return static_cast<T*>(tile.output) + row * tile.row_stride + c;
    }
    FASTRES_INLINE_BODY void add(Lane stored) {
        if constexpr (epilogue == Epilogue::moments) {
            const Lane deviation = stored - about;
            sum += deviation;
            sum_of_squares += deviation * deviation;
        }
    }
    FASTRES_INLINE_BODY void finish() const {
        if constexpr (epilogue == Epilogue::moments) {
            add_to(tile.sum + c, sum);
            add_to(tile.sum_of_squares + c, sum_of_squares);
        }
    }
};

// Takes a copy: what is stored might else be the tile's own members, which are then read again.
template <class T, bool stream, Epilogue epilogue>
FASTRES_ALWAYS void store_columns(const StoreTile tile) {
    constexpr int lanes = kLanes<float>;
    const int rows = tile.rows;
    int64_t c = 0;
    for (; c + 2 * lanes <= tile.channels; c += 2 * lanes) {
        StoreColumn<T, Vec<float>, epilogue> left(tile, c), right(tile, c + lanes);
        for (int row = 0; row < rows; ++row) {
            Vec<float> a = left.value(row), b = right.value(row);
            store_rounded<stream>(left.output(row), a, b);
            left.add(a);
            right.add(b);
        }
        left.finish();
        right.finish();
    }
    for (; c + lanes <= tile.channels; c += lanes) {
        StoreColumn<T, Vec<float>, epilogue> column(tile, c);
        for (int row = 0; row < rows; ++row) {
            const Vec<float> value = rounded_to<T>(column.value(row));
            store<false>(column.output(row), value);
            column.add(value);
        }
        column.finish();
    }
    for (; c < tile.channels; ++c) {
        StoreColumn<T, float, epilogue> column(tile, c);
        for (int row = 0; row < rows; ++row) {
            from_real(column.value(row), *column.output(row));
            column.add(to_real(*column.output(row)));
        }
        column.finish();
    }
}

template <class T, Epilogue epilogue>
FASTRES_ALWAYS void store_with(const StoreTile& tile) {
    return tile.stream ? store_columns<T, true, epilogue>(tile) : store_columns<T, false, epilogue>(tile);
}

template <class T>
void store_tile(const StoreTile& tile) {
    if (tile.sum) return store_with<T, Epilogue::moments>(tile);
    if (tile.residual) return store_with<T, Epilogue::residual_activation>(tile);
    if (tile.scale || tile.shift || tile.relu) return store_with<T, Epilogue::activation>(tile);
    return store_with<T, Epilogue::none>(tile);
}

}  // namespace fastres::cpu::FASTRES_ISA
