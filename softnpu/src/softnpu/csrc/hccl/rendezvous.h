// How the ranks of a communicator find one another: the root listens, every rank registers with it, and when all have
// registered the root sends all of them the list.
#pragma once

#include <vector>

#include "hccl/net.h"

namespace softnpu::hccl {

struct Member {
  uint32_t rank = 0;
  int32_t pid = 0;
  int32_t device = -1;      // physical number
  int32_t segment_fd = -1;  // of that process: memory that ranks of its node may map
  uint64_t segment_nonce = 0;
  std::string node;
  Address address;  // where it listens for the other members
  std::string text() const {
    return "rank " + std::to_string(rank) + " (" + address.ip + ", pid " + std::to_string(pid) + ", NPU " +
           std::to_string(device) + ")";
  }
};

struct RootInfo {
  Address address;
  Token token = 0;
  std::string bytes() const;
  static RootInfo parse(const char* data, size_t size);  // throws HCCL_E_PARA
};

// Seconds from HCCL_CONNECT_TIMEOUT; throws HCCL_E_PARA outside 120 to 7200. SOFTNPU_CONNECT_TIMEOUT, which has no
// limits and no counterpart in CANN, comes before it.
double connect_limit();
// Seconds that the first call of an operator waits for its links: 20 more than connect_limit(), as CANN documents.
double link_limit();

// Starts the listener. It exits when all ranks have joined, on an error, and at its deadline.
RootInfo open_root();

// All members, by rank. Throws the failure that all of them get: HCCL_E_TIMEOUT names the missing ranks.
std::vector<Member> join(const RootInfo& root, uint32_t ranks, const Member& self);

// A connection to every other member, by rank (none at the own one). Throws.
std::vector<Fd> connect_members(const std::vector<Member>& members, uint32_t self, const Fd& listener, Token token,
                                const Deadline& deadline);

}  // namespace softnpu::hccl
