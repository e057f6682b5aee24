// Loading of NVIDIA's driver library.
#include "cuda.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "handlers.h"

namespace moejax::cuda {
namespace {

std::atomic<const Driver*> current{nullptr};

struct Opening {
  std::mutex mutex;
  std::string library;  // that `current` is of
};

thread_local std::string last_error;  // read after the call, when other threads may fail in theirs

Opening& opening() {
  static Opening& state = *new Opening;
  return state;
}

// Why the library cannot be used, or empty.
std::string open(const std::string& library) {
  if (current) {
    const std::string& other = opening().library;
    return other == library ? "" : "the driver library " + other + " is already in use";
  }
  // Never closed: streams run its code until the process ends.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
  auto found = std::make_unique<Driver>();
#define MOEJAX_CUDA_FIND(name, parameters)                                                  \
  found->name = reinterpret_cast<decltype(found->name)>(dlsym(handle, #name));              \
  if (!found->name) return library + " has no " #name ": update the driver (CUDA 12 or newer)";
  MOEJAX_CUDA_FUNCTIONS(MOEJAX_CUDA_FIND)
#undef MOEJAX_CUDA_FIND
  Calls calls(*found);
  if (!MOEJAX_CUDA(calls, cuInit, 0u)) return calls.error();
  opening().library = library;
  current = found.release();
  return "";
}

}  // namespace

const Driver* driver() { return current.load(std::memory_order_acquire); }

bool Calls::take(const char* name, CUresult result) {
  if (result == kSuccess) return true;
  const char* text = nullptr;
  driver_.cuGetErrorString(result, &text);
  error_ = std::string(name) + ": " + (text ? text : "error " + std::to_string(result));
  return false;
}

Current::Current(Calls& calls, CUcontext context)
    : driver_(calls.driver()), pushed_(MOEJAX_CUDA(calls, cuCtxPushCurrent_v2, context)) {}

Current::~Current() {
  CUcontext context = nullptr;
  if (pushed_) driver_.cuCtxPopCurrent_v2(&context);
}

}  // namespace moejax::cuda

using moejax::cuda::last_error;
using moejax::cuda::opening;

// Null, or why the driver library cannot be used: until the thread's next call of these functions.
// The first that can be is used from then on.
MOEJAX_EXPORT const char* moejax_cuda_open(const char* library) {
  std::lock_guard<std::mutex> lock(opening().mutex);
  last_error = moejax::cuda::open(library);
  return last_error.empty() ? nullptr : last_error.c_str();
}

// Null if the host can read the memory at an address, or why it may not: of the first device.
MOEJAX_EXPORT const char* moejax_cuda_check_host(uint64_t address) {
  std::lock_guard<std::mutex> lock(opening().mutex);
  std::string& error = last_error;
  const moejax::cuda::Driver* driver = moejax::cuda::driver();
  if (!driver) return (error = "no driver library is open").c_str();
  moejax::cuda::Calls calls(*driver);
  CUdevice device = 0;
  CUcontext context = nullptr;
  unsigned type = 0;
  MOEJAX_CUDA(calls, cuDeviceGet, &device, 0);
  if (MOEJAX_CUDA(calls, cuDevicePrimaryCtxRetain, &context, device)) {
    {
      const moejax::cuda::Current scope(calls, context);
      MOEJAX_CUDA(calls, cuPointerGetAttribute, static_cast<void*>(&type),
                  moejax::cuda::kMemoryType, static_cast<CUdeviceptr>(address));
    }
    driver->cuDevicePrimaryCtxRelease_v2(device);
  }
  if (!calls.ok()) return (error = calls.error()).c_str();
  if (type == moejax::cuda::kHostMemory) return nullptr;
  return (error = "the memory is not the host's (type " + std::to_string(type) + ")").c_str();
}
