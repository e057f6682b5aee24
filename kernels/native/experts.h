// The experts' feed-forward networks, for whoever has threads to run them on (experts.cc).
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace moejax {

struct ExpertsWork {
  const uint8_t* source;  // [records, stride] bytes
  int64_t records, stride;
  const int32_t* index;   // [experts], record of each expert, -1 = not now
  int64_t experts;
  const int32_t* picks;   // [tokens, top_k] experts, -1 = none
  int64_t tokens, top_k;
  const float* x;         // [tokens, width]
  float* y;               // [tokens, top_k, width]; rows of other picks stay
  int64_t width, expert_width;
  Format format;
  int64_t gate_up_offset, down_offset;  // bytes within a record
};

// What is wrong with the work, which is not done then; empty = nothing. For xla::ffi::ThreadPool
// and for Threads.
template <class Pool>
std::string run_experts(Pool& pool, const ExpertsWork& work);

}  // namespace moejax
