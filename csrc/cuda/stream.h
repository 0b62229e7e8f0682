// cudaStream_t without CUDA's headers, for callers that a host compiler sees.
#pragma once

struct CUstream_st;

namespace fastres::cuda {

using Stream = ::CUstream_st*;

}  // namespace fastres::cuda
