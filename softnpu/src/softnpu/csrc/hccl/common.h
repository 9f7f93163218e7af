// What every part of libhccl needs: failures, time limits, and values on the wire.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "hccl/hccl.h"
#include "softnpu.h"

namespace softnpu::hccl {

using Clock = std::chrono::steady_clock;

// Thrown inside the library; the C functions turn it into its code, and its text into aclGetRecentErrMsg.
struct Failure : std::runtime_error {
  Failure(HcclResult code, const std::string& text) : std::runtime_error(text), code(code) {}
  HcclResult code;
};

class Deadline {
 public:
  explicit Deadline(double seconds)
      : end_(Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(std::min(seconds, 1e9) * 1000))) {}
  bool passed() const { return Clock::now() >= end_; }
  // Rounded up, so that a wait of this length ends past the deadline.
  int64_t milliseconds_left() const {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
    return left < 0 ? 0 : left + 1;
  }

 private:
  Clock::time_point end_;
};

// Values one after the other, in the byte order of the machine: all ranks run the same build.
class Writer {
 public:
  template <class T, class = std::enable_if_t<std::is_trivially_copyable_v<T>>>
  Writer& put(const T& value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Writer& put(const std::string& text) {
    put(static_cast<uint32_t>(text.size()));
    bytes_ += text;
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string bytes) : bytes_(std::move(bytes)) {}
  template <class T>
  T get() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    bytes_.copy(reinterpret_cast<char*>(&value), sizeof value, take(sizeof value));
    return value;
  }
  std::string text() {
    size_t size = get<uint32_t>();
    return bytes_.substr(take(size), size);
  }

 private:
  // Where the next `size` bytes start.
  size_t take(size_t size) {
    if (size > bytes_.size() - at_) throw Failure(HCCL_E_INTERNAL, "a message is shorter than its stated length");
    return std::exchange(at_, at_ + size);
  }

  std::string bytes_;
  size_t at_ = 0;
};

}  // namespace softnpu::hccl
