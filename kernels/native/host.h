// Tables of records in host memory, and experts computed from them on the library's own threads,
// for programs that run on a GPU.
#pragma once

#include <cstdint>

#include "experts.h"
#include "store.h"

namespace moejax {

// Does the work, whose `source`, `records` and `stride` are those of an open table. Throws nothing;
// where it does not succeed, all of y is NaN.
Error compute_on_host(int32_t table, ExpertsWork work) noexcept;

}  // namespace moejax
