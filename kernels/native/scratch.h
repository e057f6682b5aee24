// Aligned memory for the length of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace moejax {

struct FreeMemory {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<uint8_t[], FreeMemory>;

inline Scratch scratch(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes > 0 ? bytes : 64))) {
    throw std::bad_alloc();
  }
  return Scratch(static_cast<uint8_t*>(memory));
}

}  // namespace moejax
