// The memory of one rank that the other ranks of its node write: its doorbell, and a ring from each of them. It has no name
// in any file system, so whatever kills its processes leaves nothing behind.
#pragma once

#include <memory>

#include "hccl/net.h"
#include "hccl/ring.h"

namespace softnpu::hccl {

class Segment {
 public:
  // Throws HCCL_E_MEMORY.
  static std::shared_ptr<Segment> create(uint32_t ranks);
  // The segment of another process of this node; null if it cannot be reached (another pid namespace, another user).
  static std::shared_ptr<Segment> open(int pid, int fd, uint64_t nonce, uint32_t ranks);
  Segment(const Segment&) = delete;
  ~Segment();

  Doorbell& doorbell() { return head_->doorbell; }
  Ring& from(uint32_t rank) { return rings_[rank]; }
  int fd() const { return fd_.get(); }
  uint64_t nonce() const { return head_->nonce; }
  // No other process will open it.
  void seal() { fd_.close(); }

 private:
  struct Head {
    uint64_t nonce;
    Doorbell doorbell;
  };
  Segment(Fd fd, void* memory, size_t bytes);

  Fd fd_;
  size_t bytes_;
  Head* head_;
  Ring* rings_;
};

}  // namespace softnpu::hccl
