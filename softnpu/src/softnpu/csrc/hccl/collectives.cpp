#include "hccl/collectives.h"

#include <atomic>
#include <numeric>

namespace softnpu::hccl {
namespace {

// Up to here every rank gets all data and reduces all of it: one round instead of two.
constexpr uint64_t kSmallBytes = 32 << 10;
// Longer reductions are done in pieces, so that the peers' data fits in the cache and little memory is needed.
constexpr uint64_t kPieceBytes = 1 << 20;

// A buffer for the same piece of every other rank's data.
class Scratch {
 public:
  Scratch(const Communicator& comm, uint64_t bytes) : rank_(comm.rank()), stride_((bytes + 63) / 64 * 64) {
    memory_.reset(new char[stride_ * comm.size()]);
  }
  char* of(uint32_t rank) { return memory_.get() + rank * stride_; }
  // Pointers by rank, with `own` at this rank's place.
  std::vector<const char*> with(const char* own, uint32_t ranks) {
    std::vector<const char*> parts;
    for (uint32_t rank = 0; rank < ranks; rank++) parts.push_back(rank == rank_ ? own : of(rank));
    return parts;
  }

 private:
  uint32_t rank_;
  uint64_t stride_;
  std::unique_ptr<char[]> memory_;
};

bool overlap(const char* a, uint64_t a_bytes, const char* b, uint64_t b_bytes) {
  return a_bytes > 0 && b_bytes > 0 && std::less<>()(a, b + b_bytes) && std::less<>()(b, a + a_bytes);
}

void copy(char* to, const char* from, uint64_t bytes) {
  if (bytes > 0) memmove(to, from, bytes);
}

// Elements up to the end of the last part.
uint64_t extent(const Layout& layout) {
  uint64_t end = 0;
  for (size_t i = 0; i < layout.counts.size(); i++)
    if (layout.counts[i] > 0) end = std::max(end, layout.displacements[i] + layout.counts[i]);
  return end;
}

template <class Each>
void for_peers(const Communicator& comm, Each each) {
  // Each rank starts with its successor, so that not all of them access rank 0 first.
  for (uint32_t step = 1; step < comm.size(); step++) each((comm.rank() + step) % comm.size());
}

struct Range {
  uint64_t begin, count;
};

// The ranges of `count` elements distributed over `ranks`.
Range share(uint64_t count, uint32_t ranks, uint32_t rank) {
  uint64_t begin = count * rank / ranks;
  return {begin, count * (rank + 1) / ranks - begin};
}

// Every rank gets its own range of the sum: range(rank) is its range within `send`.
void exchange_and_reduce(Communicator& comm, const Operation& operation, const char* send, char* out, Scratch& scratch,
                         const std::function<Range(uint32_t)>& range) {
  size_t element = size_of(operation.type);
  Range own = range(comm.rank());
  std::vector<Transfer> transfers;
  for_peers(comm, [&](uint32_t peer) {
    Range theirs = range(peer);
    transfers.push_back(sending(peer, send + theirs.begin * element, theirs.count * element));
    transfers.push_back(receiving(peer, scratch.of(peer), own.count * element));
  });
  comm.move(operation, std::move(transfers));
  reduce(out, scratch.with(send + own.begin * element, comm.size()), own.count, operation.type, operation.reduce);
}

void all_reduce_piece(Communicator& comm, const Operation& operation, const char* send, char* receive, uint64_t count,
                      Scratch& scratch) {
  size_t element = size_of(operation.type);
  auto of = [&](uint32_t rank) { return share(count, comm.size(), rank); };
  Range own = of(comm.rank());
  char* result = receive + own.begin * element;
  exchange_and_reduce(comm, operation, send, result, scratch, of);
  std::vector<Transfer> transfers;
  for_peers(comm, [&](uint32_t peer) {
    Range theirs = of(peer);
    transfers.push_back(sending(peer, result, own.count * element));
    transfers.push_back(receiving(peer, receive + theirs.begin * element, theirs.count * element));
  });
  comm.move(operation, std::move(transfers));
}

}  // namespace

Layout Layout::even(uint32_t ranks, uint64_t count) {
  Layout layout;
  for (uint32_t rank = 0; rank < ranks; rank++) {
    layout.counts.push_back(count);
    layout.displacements.push_back(rank * count);
  }
  return layout;
}

Layout Layout::copy(const void* counts, const void* displacements, uint32_t ranks) {
  auto values = [&](const void* array) {
    auto* first = static_cast<const uint64_t*>(array);
    return std::vector<uint64_t>(first, first + ranks);
  };
  return {values(counts), values(displacements)};
}

void all_reduce(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type,
                HcclReduceOp op) {
  size_t element = size_of(type);
  Operation operation{Kind::kAllReduce, type, op, UINT32_MAX, count * element};
  if (count * element <= kSmallBytes) {
    Scratch scratch(comm, count * element);
    exchange_and_reduce(comm, operation, send, receive, scratch, [&](uint32_t) { return Range{0, count}; });
    return;
  }
  uint64_t piece = kPieceBytes * comm.size() / element;
  Scratch scratch(comm, std::min(kPieceBytes + element, count * element));
  for (uint64_t at = 0; at < count; at += piece)
    all_reduce_piece(comm, operation, send + at * element, receive + at * element, std::min(piece, count - at),
                     scratch);
}

void reduce_to(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
               uint32_t root) {
  size_t element = size_of(type);
  Operation operation{Kind::kReduce, type, op, root, count * element};
  uint64_t piece = kPieceBytes / element;
  bool is_root = comm.rank() == root;
  Scratch scratch(comm, is_root ? std::min(kPieceBytes, count * element) : 0);
  for (uint64_t at = 0; at < count; at += piece) {
    uint64_t size = std::min(piece, count - at), offset = at * element;
    std::vector<Transfer> transfers;
    if (is_root)
      for_peers(comm, [&](uint32_t peer) { transfers.push_back(receiving(peer, scratch.of(peer), size * element)); });
    else
      transfers.push_back(sending(root, send + offset, size * element));
    comm.move(operation, std::move(transfers));
    if (is_root) reduce(receive + offset, scratch.with(send + offset, comm.size()), size, type, op);
  }
}

void broadcast(Communicator& comm, char* data, uint64_t count, HcclDataType type, uint32_t root) {
  uint64_t bytes = count * size_of(type);
  std::vector<Transfer> transfers;
  if (comm.rank() == root)
    for_peers(comm, [&](uint32_t peer) { transfers.push_back(sending(peer, data, bytes)); });
  else
    transfers.push_back(receiving(root, data, bytes));
  comm.move({Kind::kBroadcast, type, HCCL_REDUCE_RESERVED, root, bytes}, std::move(transfers));
}

void all_gather(Communicator& comm, const char* send, uint64_t count, char* receive, const Layout& layout,
                HcclDataType type) {
  size_t element = size_of(type);
  std::vector<Transfer> transfers;
  for_peers(comm, [&](uint32_t peer) {
    transfers.push_back(sending(peer, send, count * element));
    transfers.push_back(receiving(peer, receive + layout.displacements[peer] * element, layout.counts[peer] * element));
  });
  comm.move({Kind::kAllGather, type}, std::move(transfers));
  copy(receive + layout.displacements[comm.rank()] * element, send, count * element);
}

void reduce_scatter(Communicator& comm, const char* send, const Layout& layout, char* receive, HcclDataType type,
                    HcclReduceOp op) {
  size_t element = size_of(type);
  uint64_t largest = *std::max_element(layout.counts.begin(), layout.counts.end());
  uint64_t own_bytes = layout.counts[comm.rank()] * element;
  uint64_t piece = kPieceBytes / element;
  uint64_t all = std::accumulate(layout.counts.begin(), layout.counts.end(), uint64_t{0});
  Operation operation{Kind::kReduceScatter, type, op, UINT32_MAX, all * element};
  Scratch scratch(comm, std::min(piece, largest) * element);
  // A result that lies where later pieces are still to be sent from has to wait.
  std::unique_ptr<char[]> late;
  if (overlap(send, extent(layout) * element, receive, own_bytes)) late.reset(new char[own_bytes]);
  char* out = late ? late.get() : receive;
  for (uint64_t at = 0; at < largest; at += piece) {
    exchange_and_reduce(comm, operation, send, out + at * element, scratch, [&](uint32_t rank) {
      uint64_t count = layout.counts[rank], begin = std::min(at, count);
      return Range{layout.displacements[rank] + begin, std::min(piece, count - begin)};
    });
  }
  if (late) copy(receive, late.get(), own_bytes);
}

void scatter(Communicator& comm, const char* send, char* receive, uint64_t count, HcclDataType type, uint32_t root) {
  uint64_t bytes = count * size_of(type);
  std::vector<Transfer> transfers;
  if (comm.rank() == root)
    for_peers(comm, [&](uint32_t peer) { transfers.push_back(sending(peer, send + peer * bytes, bytes)); });
  else
    transfers.push_back(receiving(root, receive, bytes));
  comm.move({Kind::kScatter, type, HCCL_REDUCE_RESERVED, root, bytes}, std::move(transfers));
  if (comm.rank() == root) copy(receive, send + root * bytes, bytes);
}

void all_to_all(Communicator& comm, const char* send, const Layout& out, HcclDataType send_type, char* receive,
                const Layout& in, HcclDataType receive_type) {
  size_t sent = size_of(send_type), received = size_of(receive_type);
  uint64_t send_bytes = extent(out) * sent;
  std::unique_ptr<char[]> before;
  if (overlap(send, send_bytes, receive, extent(in) * received)) {
    before.reset(new char[send_bytes]);
    copy(before.get(), send, send_bytes);
    send = before.get();
  }
  std::vector<Transfer> transfers;
  for_peers(comm, [&](uint32_t peer) {
    transfers.push_back(sending(peer, send + out.displacements[peer] * sent, out.counts[peer] * sent));
    transfers.push_back(receiving(peer, receive + in.displacements[peer] * received, in.counts[peer] * received));
  });
  comm.move({Kind::kAllToAll, send_type}, std::move(transfers));
  uint32_t self = comm.rank();
  copy(receive + in.displacements[self] * received, send + out.displacements[self] * sent, out.counts[self] * sent);
}

namespace {
std::atomic<uint64_t> point_to_point[4];  // messages and bytes sent, messages and bytes received
}

// What this process has sent to single peers and received from them, over all communicators: for tests.
extern "C" void softnpu_hccl_point_to_point(uint64_t* counted) {
  for (int i = 0; i < 4; i++) counted[i] = point_to_point[i];
}

void send_receive(Communicator& comm, const std::vector<HcclSendRecvItem>& items) {
  std::vector<Transfer> transfers;
  // The type is not compared: a message of bytes is one whatever each side calls its elements.
  for (const auto& item : items) {
    uint64_t bytes = item.count * size_of(item.dataType);
    bool out = item.sendRecvType == HCCL_SEND;
    transfers.push_back(out ? sending(item.remoteRank, item.buf, bytes) : receiving(item.remoteRank, item.buf, bytes));
  }
  comm.move({Kind::kSendRecv}, transfers);
  for (const auto& transfer : transfers) {
    point_to_point[transfer.sending ? 0 : 2]++;
    point_to_point[transfer.sending ? 1 : 3] += transfer.bytes;
  }
}

void barrier(Communicator& comm) {
  std::vector<Transfer> transfers;
  for_peers(comm, [&](uint32_t peer) {
    transfers.push_back(sending(peer, nullptr, 0));
    transfers.push_back(receiving(peer, nullptr, 0));
  });
  comm.move({Kind::kBarrier}, std::move(transfers));
}

}  // namespace softnpu::hccl
