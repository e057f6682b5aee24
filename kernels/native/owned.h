// Memory and files of the operating system that are given back at the end of a scope.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace moejax {

// Page-aligned memory; pages are taken when first written.
class Mapping {
 public:
  explicit Mapping(int64_t bytes) : bytes_(bytes) {
    void* data =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::runtime_error("no memory for landing buffers");
    data_ = static_cast<char*>(data);
  }
  ~Mapping() { munmap(data_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  char* data() const { return data_; }

 private:
  size_t bytes_;
  char* data_;
};

class File {
 public:
  File() = default;
  ~File() { close_file(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  bool open_path(const std::string& path, int flags) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
    return descriptor_ >= 0;
  }
  void close_file() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
  }
  int get() const { return descriptor_; }

 private:
  int descriptor_ = -1;
};

}  // namespace moejax
