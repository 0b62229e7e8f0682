// How a tensor is cut: into tasks for the threads, shares with coefficients of their own, and pieces for
// the loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/batch_norm.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fastres::cpu {

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

constexpr int64_t ceil_div(int64_t total, int64_t most) {
    return (total + most - 1) / most;
}

// Part `index` of 0..total cut into `parts`, cuts on multiples of `grain`.
inline Range part(int64_t total, int64_t parts, int64_t index, int64_t grain = 1) {
    const int64_t grains = ceil_div(total, grain);
    return {std::min(total, grains * index / parts * grain),
            std::min(total, grains * (index + 1) / parts * grain)};
}

inline int64_t tasks_for(int64_t elements, int64_t splittable, const ThreadPool& pool) {
    // Less than this is not worth its own thread (PyTorch's grain size for element-wise loops).
    constexpr int64_t elements_per_task = 32768;
    const int64_t worthwhile = std::max<int64_t>(1, elements / elements_per_task);
    return std::max<int64_t>(1, std::min({pool.threads(), worthwhile, splittable}));
}

// What is normalised by itself, up to the merge of the statistics: all channels of some rows (channels
// last), or all rows of some channels (contiguous). Rows are counted through the images.
struct Share {
    Range rows, channels;
};

// The part of a share that one call of a loop handles.
struct Piece {
    int64_t element;   // offset of the first element
    int64_t rows;      // rows, or pixels of each plane
    int64_t channels;  // coefficients of a row, or planes
};

class Cut {
  public:
    Cut(const Activation& shape, const ThreadPool& pool)
        : shape_(shape),
          rows_in_one_(rows_in_one(shape)),
          tasks_(tasks_for(shape.numel(), shape.channels_last ? shape.rows() : shape.channels, pool)) {}

    int64_t tasks() const { return tasks_; }
    // How many coefficients the loops take: those of all channels, repeated for the rows that are taken as
    // one.
    int64_t coefficients() const { return rows_in_one_ * shape_.channels; }
    // How many of them, at most, a share has.
    int64_t share_coefficients() const {
        return shape_.channels_last ? coefficients() : channels_in_share();
    }

    const Loops::Layout& loops() const {
        const Loops& loops = *kernels().loops[shape_.dtype];
        return shape_.channels_last ? loops.rows : loops.plane;
    }

    // Calls visit(Share) for all that a task handles.
    template <class Visit>
    void visit_shares(int64_t task, const Visit& visit) const {
        if (shape_.channels_last) {
            const Range rows = part(shape_.rows(), tasks_, task, rows_in_one_);
            if (rows.size() > 0) visit(Share{rows, {0, shape_.channels}});
        } else {
            const Range channels = part(shape_.channels, tasks_, task);
            for (int64_t c = channels.begin; c < channels.end; c += channels_in_share())
                visit(Share{{0, shape_.rows()}, {c, std::min(channels.end, c + channels_in_share())}});
        }
    }

    // The first `rows` of a share or some more: planes that are small are not cut.
    Range first_rows(const Share& share, int64_t rows) const {
        constexpr int64_t small_plane = 256;
        if (!shape_.channels_last && shape_.pixels <= small_plane)
            rows = (rows + shape_.pixels - 1) / shape_.pixels * shape_.pixels;
        return {share.rows.begin, std::min(share.rows.end, share.rows.begin + rows)};
    }

    // Calls visit(Piece) for all of a share, in the order of memory.
    template <class Visit>
    void visit_pieces(const Share& share, const Visit& visit) const {
        if (shape_.channels_last) {
            const int64_t rest = share.rows.size() % rows_in_one_;
            const int64_t whole = (share.rows.size() - rest) / rows_in_one_;
            if (whole > 0) visit(Piece{share.rows.begin * shape_.channels, whole, coefficients()});
            if (rest > 0)
                visit(Piece{(share.rows.end - rest) * shape_.channels, 1, rest * shape_.channels});
        } else {
            for (int64_t row = share.rows.begin; row < share.rows.end;) {
                const int64_t image = row / shape_.pixels, pixel = row % shape_.pixels;
                const int64_t rows = std::min(shape_.pixels - pixel, share.rows.end - row);
                visit(Piece{(image * shape_.channels + share.channels.begin) * shape_.pixels + pixel, rows,
                            share.channels.size()});
                row += rows;
            }
        }
    }

    // The same in chunks, the last one first: a second pass begins with what the first one left in the
    // caches.
    template <class Visit>
    void visit_pieces_backwards(const Share& share, const Visit& visit) const {
        constexpr int64_t chunk_elements =
            131072;  // long enough for a prefetcher to forget the jump between
        const int64_t rows_at_a_time =
            std::max<int64_t>(1, chunk_elements / share_coefficients()) * rows_in_one_;
        for (int64_t end = share.rows.end; end > share.rows.begin;) {
            const int64_t begin = std::max(share.rows.begin, end - rows_at_a_time);
            visit_pieces(Share{{begin, end}, share.channels}, visit);
            end = begin;
        }
    }

  private:
    // Channels last, some rows are taken as one longer row, so that the loops meet whole vectors alone.
    static int64_t rows_in_one(const Activation& shape) {
        constexpr int64_t whole = 64, longest = 4096;
        const int64_t rows = whole / std::gcd(whole, shape.channels);
        return shape.channels_last && rows * shape.channels <= longest ? rows : 1;
    }

    // Contiguous, so many channels that a second pass finds them in a core's own cache, and small planes
    // are walked in runs that a prefetcher can follow.
    int64_t channels_in_share() const {
        constexpr int64_t elements = 65536;
        return std::max<int64_t>(1, elements / shape_.rows());
    }

    const Activation& shape_;
    const int64_t rows_in_one_, tasks_;
};

}  // namespace fastres::cpu
