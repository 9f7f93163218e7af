// The algorithms. Each runs inside Communicator::run; counts are elements, displacements too. Results are the same on
// all ranks and in all runs: reductions go in the order of the ranks.
#pragma once

#include "hccl/communicator.h"
#include "hccl/reduce.h"

namespace softnpu::hccl {

// What a rank sends to, or receives from, each rank.
struct Layout {
  std::vector<uint64_t> counts, displacements;
  // `count` elements for each of `ranks`, one after the other.
  static Layout even(uint32_t ranks, uint64_t count);
  // The arrays that a caller passed; uint64 each.
  static Layout copy(const void* counts, const void* displacements, uint32_t ranks);
};

void all_reduce(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type,
                HcclReduceOp op);
void reduce_to(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
               uint32_t root);
void broadcast(Communicator& comm, char* data, uint64_t count, HcclDataType type, uint32_t root);
void all_gather(Communicator& comm, const char* send, uint64_t count, char* receive, const Layout& layout,
                HcclDataType type);
void reduce_scatter(Communicator& comm, const char* send, const Layout& layout, char* receive, HcclDataType type,
                    HcclReduceOp op);
void scatter(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type, uint32_t root);
void all_to_all(Communicator& comm, const char* send, const Layout& out, HcclDataType send_type, char* receive,
                const Layout& in, HcclDataType receive_type);
void send_receive(Communicator& comm, const std::vector<HcclSendRecvItem>& items);
void barrier(Communicator& comm);

}  // namespace softnpu::hccl
