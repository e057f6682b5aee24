// A driver library for tests without a GPU: "device" memory is the host's, and a stream is a thread
// that does its work in order. It can hold its streams back, and fail any call.
//
// fake_on_cpu passes calls of XLA's CPU backend to a handler of GPUs, with a stream of this library.
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct CUstream_st {
  explicit CUstream_st(unsigned long long id) : id(id), worker([this] { serve(); }) {}

  void add(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  void hold(bool held) {
    std::lock_guard<std::mutex> lock(mutex);
    allowed = held ? 0 : -1;
    changed.notify_all();
  }
  void let(int pieces) {
    std::unique_lock<std::mutex> lock(mutex);
    allowed = pieces;
    changed.notify_all();
    changed.wait(lock, [this] { return allowed == 0 && !busy; });
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return queue.empty() && !busy; });
  }

  const unsigned long long id;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  int allowed = -1;  // pieces of work, -1 = all
  bool busy = false;
  std::thread worker;

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return allowed && !queue.empty(); });
      const auto work = std::move(queue.front());
      queue.pop_front();
      if (allowed > 0) --allowed;
      busy = true;
      lock.unlock();
      work();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
};

namespace {

constexpr int kFailure = 2, kNoContext = 201, kInvalid = 1;

std::mutex mutex;  // of all that follows
std::string failing;
int failing_at = 0;
std::map<void*, size_t> pinned;
std::map<char*, size_t> device;  // memory that only copies may touch
std::vector<CUstream_st*> streams;
CUstream_st* current = nullptr;
bool deferred = false;
XLA_FFI_Handler* handler = nullptr;
std::atomic<int> forbidden{0};  // calls of the driver from a host function
std::atomic<int> launched{0}, ran{0};
thread_local bool in_host_function = false;
thread_local std::vector<void*> contexts;
int the_context;

int enter(const char* name, bool in_context = false) {
  if (in_host_function) ++forbidden;
  std::lock_guard<std::mutex> lock(mutex);
  if (failing == name && --failing_at == 0) return kFailure;
  return in_context && contexts.empty() ? kNoContext : 0;
}

// Copies although one side may be device memory.
void copy(void* to, const void* from, size_t bytes) {
  const auto allow = [&](const void* at, int protection) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = device.find(static_cast<char*>(const_cast<void*>(at)));
    if (found != device.end()) mprotect(found->first, found->second, protection);
  };
  allow(to, PROT_READ | PROT_WRITE);
  allow(from, PROT_READ);
  std::memcpy(to, from, bytes);
  allow(to, PROT_NONE);
  allow(from, PROT_NONE);
}

char* device_memory(const void* from, size_t bytes) {
  const size_t size = (bytes + 4096) / 4096 * 4096;
  void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) std::abort();
  {
    std::lock_guard<std::mutex> lock(mutex);
    device[static_cast<char*>(found)] = size;
  }
  if (from) copy(found, from, bytes);
  return static_cast<char*>(found);
}

XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = current;
  return nullptr;
}

size_t size_of(const XLA_FFI_Buffer& buffer) {
  size_t bytes = 4;  // S32 and F32 are all there are
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.dims[i];
  return bytes;
}

// Results of deferred calls, in device memory.
std::vector<std::vector<char*>> results;

}  // namespace

// --- The driver ---

EXPORT int cuInit(unsigned) { return enter("cuInit"); }
EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == kFailure ? "made to fail" : error == kNoContext ? "no context" : "invalid";
  return 0;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return enter("cuDeviceGet");
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &the_context;
  return enter("cuDevicePrimaryCtxRetain");
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return enter("cuDevicePrimaryCtxRelease_v2"); }
EXPORT int cuCtxPushCurrent_v2(void* context) {
  const int error = enter("cuCtxPushCurrent_v2");
  if (!error) contexts.push_back(context);
  return error;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  const int error = enter("cuCtxPopCurrent_v2", true);
  if (error) return error;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}
EXPORT int cuStreamGetCtx(CUstream_st*, void** context) {
  *context = &the_context;
  return enter("cuStreamGetCtx");
}
EXPORT int cuStreamGetId(CUstream_st* stream, unsigned long long* id) {
  *id = stream->id;
  return enter("cuStreamGetId");
}
EXPORT int cuPointerGetAttribute(void* data, int attribute, unsigned long long address) {
  if (const int error = enter("cuPointerGetAttribute", true)) return error;
  if (attribute != 2) return kInvalid;
  std::lock_guard<std::mutex> lock(mutex);
  *static_cast<unsigned*>(data) = device.count(reinterpret_cast<char*>(address)) ? 2 : 1;
  return 0;
}
EXPORT int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  if (const int error = enter("cuMemHostAlloc", true)) return error;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::memset(*memory, 0xAB, bytes);
  std::lock_guard<std::mutex> lock(mutex);
  pinned[*memory] = bytes;
  return 0;
}
EXPORT int cuMemFreeHost(void* memory) {
  if (const int error = enter("cuMemFreeHost", true)) return error;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = pinned.find(memory);
  if (found == pinned.end()) return kInvalid;
  std::memset(memory, 0xDD, found->second);  // whoever still reads it has wrong numbers
  std::free(memory);
  pinned.erase(found);
  return 0;
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes,
                                CUstream_st* stream) {
  if (const int error = enter("cuMemcpyDtoHAsync_v2", true)) return error;
  stream->add([=] { copy(to, reinterpret_cast<const void*>(from), bytes); });
  return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes,
                                CUstream_st* stream) {
  if (const int error = enter("cuMemcpyHtoDAsync_v2", true)) return error;
  stream->add([=] { copy(reinterpret_cast<void*>(to), from, bytes); });
  return 0;
}
EXPORT int cuLaunchHostFunc(CUstream_st* stream, void (*function)(void*), void* data) {
  if (const int error = enter("cuLaunchHostFunc", true)) return error;
  ++launched;
  stream->add([=] {
    in_host_function = true;
    function(data);
    in_host_function = false;
    ++ran;
  });
  return 0;
}

// --- What tests ask of it ---

// Streams are made when first used; calls go into this one from now on.
EXPORT void fake_use_stream(int index) {
  while (static_cast<int>(streams.size()) <= index) {
    streams.push_back(new CUstream_st(streams.size() + 1));
  }
  current = streams[index];
}
EXPORT void fake_hold(int held) { current->hold(held != 0); }
// Of a stream that is held back: does so many pieces of work.
EXPORT void fake_let(int pieces) { current->let(pieces); }
EXPORT void fake_wait() { current->wait(); }
// The nth call of that name from now on fails, once.
EXPORT void fake_fail(const char* name, int nth) {
  std::lock_guard<std::mutex> lock(mutex);
  failing = name;
  failing_at = nth;
}
EXPORT int fake_failures_left() {
  std::lock_guard<std::mutex> lock(mutex);
  return failing_at > 0;
}
EXPORT int fake_pinned() {
  std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(pinned.size());
}
EXPORT int fake_forbidden() { return forbidden; }
EXPORT int fake_launched() { return launched; }
EXPORT int fake_ran() { return ran; }
EXPORT void* fake_device_memory(int64_t bytes) { return device_memory(nullptr, bytes); }
EXPORT void fake_set_handler(XLA_FFI_Handler* real) { handler = real; }

// Deferred calls return before they are done. They work on copies of their operands that only the
// stream can read; their results are had with fake_result, and XLA gets zeros.
EXPORT void fake_defer(int on) {
  deferred = on != 0;
  results.clear();
}
EXPORT void fake_result(int call, int result, void* to, int64_t bytes) {
  copy(to, results[call][result], bytes);
}

EXPORT XLA_FFI_Error* fake_on_cpu(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start) return handler(frame);  // asks for the version of the interface
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = get_stream;
  XLA_FFI_CallFrame call = *frame;
  call.api = &api;
  if (!deferred) {
    XLA_FFI_Error* error = handler(&call);
    current->wait();
    return error;
  }
  std::vector<XLA_FFI_Buffer> buffers;
  const int64_t inputs = frame->args.size, outputs = frame->rets.size;
  std::vector<void*> pointers(inputs + outputs);
  buffers.reserve(pointers.size());
  results.emplace_back();
  for (int64_t i = 0; i < inputs + outputs; ++i) {
    const bool input = i < inputs;
    const auto* given =
        static_cast<XLA_FFI_Buffer*>(input ? frame->args.args[i] : frame->rets.rets[i - inputs]);
    buffers.push_back(*given);
    buffers[i].data = device_memory(input ? given->data : nullptr, size_of(*given));
    pointers[i] = &buffers[i];
    if (input) continue;
    results.back().push_back(static_cast<char*>(buffers[i].data));
    std::memset(given->data, 0, size_of(*given));
  }
  call.args.args = pointers.data();
  call.rets.rets = pointers.data() + inputs;
  return handler(&call);
}
