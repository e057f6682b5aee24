// Choice of the instruction set, and the functions that Python calls through ctypes.
#include <atomic>
#include <cstring>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "handlers.h"
#include "kernels.h"
#include "parallel.h"

#define MOEJAX_DECLARE(isa)     \
  namespace moejax::isa {       \
  extern const Kernels kTable; \
  }

#if defined(MOEJAX_HAS_baseline)
MOEJAX_DECLARE(baseline)
#endif
#if defined(MOEJAX_HAS_avx2)
MOEJAX_DECLARE(avx2)
#endif
#if defined(MOEJAX_HAS_avx512)
MOEJAX_DECLARE(avx512)
#endif
#if defined(MOEJAX_HAS_avx512bf16)
MOEJAX_DECLARE(avx512bf16)
#endif
#if defined(MOEJAX_HAS_amx)
MOEJAX_DECLARE(amx)
#endif
#if defined(MOEJAX_HAS_amxbf16)
MOEJAX_DECLARE(amxbf16)
#endif
#if defined(MOEJAX_HAS_neon)
MOEJAX_DECLARE(neon)
#endif

namespace moejax {

std::atomic<int> worker_limit{0};
Notice& notice = *new Notice;  // never destroyed: workers may outlive main

namespace {

std::string& names(bool cuda) {
  static std::string text[2];
  return text[cuda];
}

struct Candidate {
  const Kernels* table;
  bool usable;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() {
  // Asked of the processor itself: compilers disagree on the name of this feature.
  unsigned a = 7, b = 0, c = 1, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && (a >> 5 & 1);
}

bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool there = has_avx512bf16() && __builtin_cpu_supports("avx512vbmi") && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
  // The kernel gives the memory for tiles to processes that ask for it.
  constexpr long kRequest = 0x1023, kTileData = 18;
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Candidate candidates[] = {  // best last
#if defined(MOEJAX_HAS_baseline)
      {&baseline::kTable, true},
#endif
#if defined(MOEJAX_HAS_avx2)
      {&avx2::kTable, has_avx2()},
#endif
#if defined(MOEJAX_HAS_avx512)
      {&avx512::kTable, has_avx512()},
#endif
#if defined(MOEJAX_HAS_avx512bf16)
      {&avx512bf16::kTable, has_avx512bf16()},
#endif
#if defined(MOEJAX_HAS_amxbf16)
      {&amxbf16::kTable, has_amx()},  // slower than the next for single tokens
#endif
#if defined(MOEJAX_HAS_amx)
      {&amx::kTable, has_amx()},
#endif
#if defined(MOEJAX_HAS_neon)
      {&neon::kTable, true},
#endif
  };
  const Kernels* found = nullptr;
  for (const Candidate& candidate : candidates) {
    if (candidate.usable && (!name || !std::strcmp(name, candidate.table->name))) {
      found = candidate.table;
    }
  }
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{find(nullptr)};
  return table;
}

}  // namespace

Registrar::Registrar(const char* name, bool cuda) {
  std::string& listed = names(cuda);
  if (!listed.empty()) listed += ",";
  listed += name;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace moejax

// Comma-separated names of the exported FFI handlers: of CPUs, and of NVIDIA's GPUs.
MOEJAX_EXPORT const char* moejax_handlers() { return moejax::names(false).c_str(); }
MOEJAX_EXPORT const char* moejax_cuda_handlers() { return moejax::names(true).c_str(); }

MOEJAX_EXPORT const char* moejax_isa() { return moejax::kernels().name; }

// 1, or 0 when the machine or the build lacks the instruction set. Not while a handler runs.
MOEJAX_EXPORT int moejax_set_isa(const char* name) {
  const moejax::Kernels* table = moejax::find(name);
  if (table) moejax::current() = table;
  return table != nullptr;
}

// Threads per call at most; 0 = as many as XLA's pool has.
MOEJAX_EXPORT void moejax_set_workers(int limit) { moejax::worker_limit = limit; }
