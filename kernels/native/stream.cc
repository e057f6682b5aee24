// Experts computed on the host as a part of a GPU's stream: what they need is copied to the host,
// a host function computes them, and the result is copied back. Nobody waits but the stream.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.h"
#include "experts.h"
#include "handlers.h"
#include "host.h"

namespace moejax {
namespace {

using cuda::Calls;

constexpr int64_t kLeastMemory = 1 << 16;

// Pinned memory of one stream. A stream does its work in order, so that one call's copies to the
// host follow those of the call before to the device: all calls share the memory. What it has
// outgrown is freed when a later host function shows that the stream is past its last use.
struct Lane {
  struct Outgrown {
    void* memory;
    int64_t last;  // call that used it
  };
  std::mutex mutex;  // calls are put into the stream one by one
  uint8_t* memory = nullptr;
  int64_t size = 0;
  int64_t issued = 0;              // calls put into the stream
  std::atomic<int64_t> passed{0};  // calls that the stream has done with
  std::vector<Outgrown> outgrown;

  bool reserve(Calls& calls, int64_t bytes) {
    const auto done = [&](const Outgrown& old) {
      return old.last <= passed.load(std::memory_order_acquire) &&
             calls.driver().cuMemFreeHost(old.memory) == cuda::kSuccess;
    };
    outgrown.erase(std::remove_if(outgrown.begin(), outgrown.end(), done), outgrown.end());
    if (bytes <= size) return true;
    int64_t larger = std::max(kLeastMemory, size);
    while (larger < bytes) larger *= 2;
    void* found = nullptr;
    outgrown.reserve(outgrown.size() + 1);
    if (!MOEJAX_CUDA(calls, cuMemHostAlloc, &found, static_cast<size_t>(larger),
                     cuda::kPortable)) {
      return false;
    }
    if (memory) outgrown.push_back({memory, issued});
    memory = static_cast<uint8_t*>(found);
    size = larger;
    return true;
  }
};

// By the stream's id, which no later stream has; never destroyed, like the streams of XLA.
Lane& lane_of(uint64_t id) {
  static std::mutex& mutex = *new std::mutex;
  static auto& lanes = *new std::unordered_map<uint64_t, std::unique_ptr<Lane>>;
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Lane>& found = lanes[id];
  if (!found) found = std::make_unique<Lane>();
  return *found;
}

struct HostCall {
  Lane* lane;
  int64_t number;
  const int32_t* table;
  ExpertsWork work;
  int32_t* status;
};

// On a thread of the driver, which must not be called from here.
void host_function(void* data) {
  const std::unique_ptr<HostCall> call(static_cast<HostCall*>(data));
  call->lane->passed.store(call->number - 1, std::memory_order_release);
  *call->status = compute_on_host(*call->table, call->work);
}

// Where an operand or a result lies in the lane's memory.
struct Part {
  const void* device;
  int64_t bytes, at;
};

ffi::Error HostExperts(CUstream stream, ffi::BufferR0<ffi::S32> table,
                       ffi::BufferR1<ffi::S32> index, ffi::BufferR2<ffi::S32> picks,
                       ffi::BufferR2<ffi::F32> x, ffi::Result<ffi::BufferR3<ffi::F32>> y,
                       ffi::Result<ffi::BufferR1<ffi::S32>> status, int64_t expert_width,
                       int64_t format, int64_t gate_up_offset, int64_t down_offset) {
  const cuda::Driver* driver = cuda::driver();
  if (!driver) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "no CUDA driver is open");
  int64_t total = 0;
  const auto part = [&](const auto& buffer) {
    const Part found{buffer.untyped_data(), static_cast<int64_t>(buffer.size_bytes()), total};
    total += round_up(found.bytes, kPartAlignment);
    return found;
  };
  const Part inputs[] = {part(table), part(index), part(picks), part(x)};
  const Part outputs[] = {part(*y), part(*status)};
  Calls calls(*driver);
  CUcontext context = nullptr;
  unsigned long long id = 0;
  MOEJAX_CUDA(calls, cuStreamGetCtx, stream, &context);
  MOEJAX_CUDA(calls, cuStreamGetId, stream, &id);
  const cuda::Current scope(calls, context);
  if (!calls.ok()) return ffi::Error::Internal("moejax_cuda_host_experts: " + calls.error());
  Lane& lane = lane_of(id);
  std::lock_guard<std::mutex> lock(lane.mutex);
  if (!lane.reserve(calls, total)) {
    return ffi::Error::Internal("moejax_cuda_host_experts: " + calls.error());
  }
  const auto at = [&](const Part& some) { return lane.memory + some.at; };
  for (const Part& input : inputs) {
    if (!input.bytes) continue;
    MOEJAX_CUDA(calls, cuMemcpyDtoHAsync_v2, static_cast<void*>(at(input)),
                reinterpret_cast<CUdeviceptr>(input.device), static_cast<size_t>(input.bytes),
                stream);
  }
  const ExpertsWork work{nullptr,
                         0,
                         0,
                         reinterpret_cast<const int32_t*>(at(inputs[1])),
                         static_cast<int64_t>(index.element_count()),
                         reinterpret_cast<const int32_t*>(at(inputs[2])),
                         static_cast<int64_t>(picks.dimensions()[0]),
                         static_cast<int64_t>(picks.dimensions()[1]),
                         reinterpret_cast<const float*>(at(inputs[3])),
                         reinterpret_cast<float*>(at(outputs[0])),
                         static_cast<int64_t>(x.dimensions()[1]),
                         expert_width,
                         static_cast<Format>(format),
                         gate_up_offset,
                         down_offset};
  auto call = std::make_unique<HostCall>(
      HostCall{&lane, lane.issued + 1, reinterpret_cast<const int32_t*>(at(inputs[0])), work,
               reinterpret_cast<int32_t*>(at(outputs[1]))});
  if (MOEJAX_CUDA(calls, cuLaunchHostFunc, stream, host_function,
                  static_cast<void*>(call.get()))) {
    call.release();  // the host function's from now on, whatever fails after it
    ++lane.issued;
  }
  for (const Part& output : outputs) {
    if (!output.bytes) continue;
    MOEJAX_CUDA(calls, cuMemcpyHtoDAsync_v2, reinterpret_cast<CUdeviceptr>(output.device),
                static_cast<const void*>(at(output)), static_cast<size_t>(output.bytes), stream);
  }
  // XLA fails the whole program then: what was put into the stream reads and writes memory that
  // stays, and no result is used.
  if (!calls.ok()) return ffi::Error::Internal("moejax_cuda_host_experts: " + calls.error());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

MOEJAX_CUDA_HANDLER(moejax_cuda_host_experts, moejax::HostExperts,
                    moejax::ffi::Ffi::Bind()
                        .Ctx<moejax::ffi::PlatformStream<CUstream>>()
                        .Arg<moejax::ffi::BufferR0<moejax::ffi::S32>>()
                        .Arg<moejax::ffi::BufferR1<moejax::ffi::S32>>()
                        .Arg<moejax::ffi::BufferR2<moejax::ffi::S32>>()
                        .Arg<moejax::ffi::BufferR2<moejax::ffi::F32>>()
                        .Ret<moejax::ffi::BufferR3<moejax::ffi::F32>>()
                        .Ret<moejax::ffi::BufferR1<moejax::ffi::S32>>()
                        .Attr<int64_t>("expert_width")
                        .Attr<int64_t>("format")
                        .Attr<int64_t>("gate_up_offset")
                        .Attr<int64_t>("down_offset"));
