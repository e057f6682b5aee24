// NVIDIA's driver library, loaded at run time: neither its headers nor the library itself have to be
// there. The prototypes are those of CUDA 12 and 13.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;
struct CUctx_st;
using CUstream = CUstream_st*;
using CUcontext = CUctx_st*;
using CUdevice = int;
using CUresult = int;
using CUdeviceptr = unsigned long long;
using CUhostFn = void (*)(void* data);

namespace moejax::cuda {

constexpr CUresult kSuccess = 0;
constexpr unsigned kPortable = 1;          // CU_MEMHOSTALLOC_PORTABLE
constexpr int kMemoryType = 2;             // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
constexpr unsigned kHostMemory = 1;        // CU_MEMORYTYPE_HOST

// Name in the library, result and parameters of each function.
#define MOEJAX_CUDA_FUNCTIONS(DO)                                              \
  DO(cuInit, (unsigned))                                                       \
  DO(cuGetErrorString, (CUresult, const char**))                               \
  DO(cuDeviceGet, (CUdevice*, int))                                            \
  DO(cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice))                         \
  DO(cuDevicePrimaryCtxRelease_v2, (CUdevice))                                 \
  DO(cuCtxPushCurrent_v2, (CUcontext))                                         \
  DO(cuCtxPopCurrent_v2, (CUcontext*))                                         \
  DO(cuStreamGetCtx, (CUstream, CUcontext*))                                   \
  DO(cuStreamGetId, (CUstream, unsigned long long*))                           \
  DO(cuPointerGetAttribute, (void*, int, CUdeviceptr))                         \
  DO(cuMemHostAlloc, (void**, size_t, unsigned))                               \
  DO(cuMemFreeHost, (void*))                                                   \
  DO(cuMemcpyDtoHAsync_v2, (void*, CUdeviceptr, size_t, CUstream))             \
  DO(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void*, size_t, CUstream))       \
  DO(cuLaunchHostFunc, (CUstream, CUhostFn, void*))

struct Driver {
#define MOEJAX_CUDA_FIELD(name, parameters) CUresult(*name) parameters = nullptr;
  MOEJAX_CUDA_FUNCTIONS(MOEJAX_CUDA_FIELD)
#undef MOEJAX_CUDA_FIELD
};

// Null before the library was opened.
const Driver* driver();

// The first call that failed, and why; calls after it are not made.
class Calls {
 public:
  explicit Calls(const Driver& driver) : driver_(driver) {}

  template <class Function, class... Arguments>
  bool operator()(const char* name, Function Driver::*function, Arguments... arguments) {
    return ok() && take(name, (driver_.*function)(arguments...));
  }
  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  const Driver& driver() const { return driver_; }

 private:
  bool take(const char* name, CUresult result);

  const Driver& driver_;
  std::string error_;
};

#define MOEJAX_CUDA(calls, name, ...) calls(#name, &::moejax::cuda::Driver::name, __VA_ARGS__)

// Makes a context current on this thread while it lives.
class Current {
 public:
  Current(Calls& calls, CUcontext context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  bool pushed_;
};

}  // namespace moejax::cuda
