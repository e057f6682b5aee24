// Choice of the instruction set, and the functions that Python calls through ctypes.
#include <atomic>
#include <cerrno>
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
  bool (*usable)();
};

bool always() { return true; }

#if defined(__x86_64__)
// Features that compilers disagree on the names of are asked of the processor itself.
struct Features {
  unsigned a, b, c, d;

  explicit Features(unsigned part) : a(7), b(0), c(part), d(0) {
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "+d"(d));
  }
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() {  // and VNNI
  return has_avx512() && (Features(1).a >> 5 & 1) && (Features(0).c >> 11 & 1);
}

// Why the system keeps tiles from this process; null if it does not.
std::atomic<const char*> refusal{nullptr};

// A process has tiles once it has asked for them; from then on it can have no signal stack that is
// too small for them. So only a process that is to use them asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  refusal = granted           ? nullptr
            : errno == ENOSPC ? "a signal stack of the process is too small for them"
                              : "the system refuses them";
  return granted;
#else
  return false;
#endif
}

bool has_amx() {
  const Features found(0);
  const bool there = (found.c >> 1 & 1) && (found.d >> 24 & 1) && (found.d >> 25 & 1);
  return has_avx512bf16() && there && may_use_tiles();
}

bool has_amxbf16() { return (Features(0).d >> 22 & 1) && has_amx(); }
#endif

constexpr Candidate kCandidates[] = {  // best first
#if defined(MOEJAX_HAS_amx)
    {&amx::kTable, has_amx},
#endif
#if defined(MOEJAX_HAS_avx512bf16)
    {&avx512bf16::kTable, has_avx512bf16},
#endif
#if defined(MOEJAX_HAS_avx512)
    {&avx512::kTable, has_avx512},
#endif
#if defined(MOEJAX_HAS_avx2)
    {&avx2::kTable, has_avx2},
#endif
#if defined(MOEJAX_HAS_baseline)
    {&baseline::kTable, always},
#endif
#if defined(MOEJAX_HAS_neon)
    {&neon::kTable, always},
#endif
#if defined(MOEJAX_HAS_amxbf16)
    {&amxbf16::kTable, has_amxbf16},  // slower than amx for single tokens: by name only
#endif
};

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Candidate& candidate : kCandidates) {
    const bool meant = !name || !std::strcmp(name, candidate.table->name);
    if (meant && candidate.usable()) return candidate.table;
  }
  return nullptr;
}

std::atomic<const Kernels*> current{nullptr};  // null until the first use, or until it is set

}  // namespace

Registrar::Registrar(const char* name, bool cuda) {
  std::string& listed = names(cuda);
  if (!listed.empty()) listed += ",";
  listed += name;
}

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_relaxed);
  if (!table) current = table = find(nullptr);
  return *table;
}

}  // namespace moejax

// Comma-separated names of the exported FFI handlers: of CPUs, and of NVIDIA's GPUs.
MOEJAX_EXPORT const char* moejax_handlers() { return moejax::names(false).c_str(); }
MOEJAX_EXPORT const char* moejax_cuda_handlers() { return moejax::names(true).c_str(); }

MOEJAX_EXPORT const char* moejax_isa() { return moejax::kernels().name; }

// 1, or 0 when the machine or the build lacks the instruction set. Not while a handler runs.
MOEJAX_EXPORT int moejax_set_isa(const char* name) {
  const moejax::Kernels* table = moejax::find(name);
  if (table) moejax::current = table;
  return table != nullptr;
}

// Why AMX is not used although the processor has it; null if that is not so.
MOEJAX_EXPORT const char* moejax_tiles_refused() {
#if defined(__x86_64__)
  return moejax::refusal;
#else
  return nullptr;
#endif
}

// Threads per call at most; 0 = as many as XLA's pool has.
MOEJAX_EXPORT void moejax_set_workers(int limit) { moejax::worker_limit = limit; }
