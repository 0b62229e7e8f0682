// The tiles that 3x3 convolutions are cut into for Winograd's F(2x2, 3x3): 4x4 pixels of the input, of
// which neighbours overlap, for 2x2 of the output.
#pragma once

#include "cpu/conv_box.h"
#include "cpu/conv_kernels.h"

namespace fastres::cpu {

inline constexpr int64_t kTileSide = 4, kTileProducts = kTileSide * kTileSide;
inline constexpr int64_t kTileStep = 2;  // pixels of the output, and from one tile to the next

inline Axes tiles_of(Axes out) {
    return {ceil_div(out.h, kTileStep), ceil_div(out.w, kTileStep)};
}

// The pixels of the output, or of the input, that a box of tiles has in each image.
inline Axes out_pixels_of(const Box& tiles) {
    return {kTileStep * tiles.rows.size(), kTileStep * tiles.columns.size()};
}
inline Axes in_pixels_of(const Box& tiles) {
    const Axes out = out_pixels_of(tiles);
    return {out.h + kTileSide - kTileStep, out.w + kTileSide - kTileStep};
}

// Transforms each tile of a box. `first` is what is done for the first one, whose `in` points into
// [image][pixels.h][pixels.w]; results are out_stride floats apart.
inline void transform_tiles(const Box& tiles, Axes pixels, void (*transform)(const MatrixTransform&),
                            const MatrixTransform& first, int64_t out_stride) {
    MatrixTransform tile = first;
    for (int64_t image = 0; image < tiles.images.size(); ++image) {
        for (int64_t row = 0; row < tiles.rows.size(); ++row) {
            for (int64_t column = 0; column < tiles.columns.size(); ++column) {
                const int64_t pixel = (image * pixels.h + kTileStep * row) * pixels.w + kTileStep * column;
                tile.in = first.in + pixel * first.in_column;
                transform(tile);
                tile.out += out_stride;
            }
        }
    }
}

}  // namespace fastres::cpu
