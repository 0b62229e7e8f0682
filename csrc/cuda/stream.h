// cudaStream_t without CUDA's headers, for callers that a host compiler sees.
#pragma once

struct CUstream_st;

namespace fastres::cuda {

using Stream = ::CUstream_st*;

// Let a launch begin while the last blocks of the one ahead of it on the stream end, where the card can
// (compute capability 9.0 and later); at first not, as no card has timed it. Its kernel waits where it
// begins for those ahead: see begin_in_stream_order() in ptx.cuh. A kernel of somebody else's between two
// of ours that is launched so, and never waits, would break the order.
void overlap_launches(bool overlap);

}  // namespace fastres::cuda
