// A byte queue with one writer and one reader, and the doorbell that wakes its waiters; both work across processes.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>

#include "hccl/common.h"

namespace softnpu::hccl {

class Ring {
 public:
  static constexpr size_t kBytes = 256 << 10;

  size_t filled() const { return tail_.load() - head_.load(); }
  uint64_t consumed() const { return head_.load(); }
  uint64_t produced() const { return tail_.load(); }
  // Messages that the reader has asked for so far; a sender begins none before.
  uint64_t expected() const { return expected_.load(); }
  void expect(uint64_t messages) { expected_.store(messages); }

  // The next stretch without a wrap that may be written or read, of at most `limit` bytes; commit reports how much of
  // it was used.
  std::pair<char*, size_t> writable(size_t limit) {
    uint64_t tail = tail_.load();
    size_t at = tail % kBytes;
    return {data_ + at, std::min({limit, kBytes - at, kBytes - static_cast<size_t>(tail - consumed())})};
  }
  void commit_write(size_t bytes) { tail_.fetch_add(bytes); }
  std::pair<const char*, size_t> readable(size_t limit) const {
    uint64_t head = head_.load();
    size_t at = head % kBytes;
    return {data_ + at, std::min({limit, kBytes - at, static_cast<size_t>(produced() - head)})};
  }
  void commit_read(size_t bytes) { head_.fetch_add(bytes); }

  // Copies what fits now; returns how much that was.
  size_t put(const char* from, size_t bytes) {
    size_t done = 0;
    for (size_t step = 1; step > 0 && done < bytes; done += step) {
      auto [to, size] = writable(bytes - done);
      memcpy(to, from + done, step = size);
      commit_write(size);
    }
    return done;
  }
  size_t get(char* to, size_t bytes) {
    size_t done = 0;
    for (size_t step = 1; step > 0 && done < bytes; done += step) {
      auto [from, size] = readable(bytes - done);
      memcpy(to + done, from, step = size);
      commit_read(size);
    }
    return done;
  }

 private:
  alignas(64) std::atomic<uint64_t> head_{0};
  std::atomic<uint64_t> expected_{0};  // the reader's too
  alignas(64) std::atomic<uint64_t> tail_{0};
  alignas(64) char data_[kBytes];
};

class Doorbell {
 public:
  uint32_t count() const { return count_.load(); }

  void ring() {
    count_.fetch_add(1);
    if (sleepers_.load() > 0) syscall(SYS_futex, &count_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // Waits until the doorbell has rung since count() was `seen`; false when the deadline passes. Small messages between two
  // busy ranks come within microseconds, so it spins for a moment before it sleeps.
  bool wait(uint32_t seen, const Deadline& deadline) {
    auto spin_until = Clock::now() + std::chrono::microseconds(40);
    do {
      if (count() != seen) return true;
      sched_yield();
    } while (Clock::now() < spin_until);
    sleepers_.fetch_add(1);
    while (count() == seen && !deadline.passed()) {
      int64_t left = deadline.milliseconds_left();
      timespec limit{left / 1000, (left % 1000) * 1000000};
      syscall(SYS_futex, &count_, FUTEX_WAIT, seen, &limit, nullptr, 0);
    }
    sleepers_.fetch_sub(1);
    return count() != seen;
  }

 private:
  alignas(64) std::atomic<uint32_t> count_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace softnpu::hccl
