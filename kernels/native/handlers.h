// How a source file adds an XLA FFI handler to the library.
//
//   static ffi::Error Impl(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y);
//   MOEJAX_HANDLER(moejax_name, Impl,
//                  ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
//
// at file scope, outside any namespace. The handler is exported, its name is listed by
// moejax_handlers() and build.py registers it with JAX under that name; MOEJAX_CUDA_HANDLER is for
// those of GPUs, which are listed by moejax_cuda_handlers(). A handler answers XLA's metadata
// request with the version of the FFI header, so XLA refuses a library it cannot call.
#pragma once

#include "xla/ffi/api/ffi.h"

#define MOEJAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace moejax {

namespace ffi = xla::ffi;

struct Registrar {
  Registrar(const char* name, bool cuda);  // dispatch.cc
};

}  // namespace moejax

#define MOEJAX_ANY_HANDLER(name, impl, cuda, ...)                                   \
  MOEJAX_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) {                     \
    static auto* handler = (__VA_ARGS__).To(impl).release();                        \
    return handler->Call(frame);                                                    \
  }                                                                                 \
  static const ::moejax::Registrar name##_registrar(#name, cuda)

#define MOEJAX_HANDLER(name, impl, ...) MOEJAX_ANY_HANDLER(name, impl, false, __VA_ARGS__)
#define MOEJAX_CUDA_HANDLER(name, impl, ...) MOEJAX_ANY_HANDLER(name, impl, true, __VA_ARGS__)
