// A communicator: its members, the links to them, and the engine that moves a set of messages to completion.
#pragma once

#include <map>
#include <set>
#include <vector>

#include "hccl/link.h"
#include "hccl/rendezvous.h"

namespace softnpu::hccl {

enum class Kind : uint32_t {
  kAllReduce = 1,
  kReduce,
  kBroadcast,
  kAllGather,
  kReduceScatter,
  kScatter,
  kAllToAll,
  kSendRecv,
  kBarrier,
};

// What all ranks must agree on, so that each message can be checked against what its receiver expects.
struct Operation {
  Kind kind;
  HcclDataType type = HCCL_DATA_TYPE_RESERVED;
  HcclReduceOp reduce = HCCL_REDUCE_RESERVED;
  uint32_t root = UINT32_MAX;
  uint64_t total = 0;  // bytes of the whole operation where they are the same on all ranks, else 0

  std::string text() const;
};

const char* kind_name(Kind kind);

// Precedes the bytes of each message.
struct Header {
  Operation operation;
  uint64_t sequence;  // of the messages from this sender to this receiver
  uint64_t bytes;

  std::string text() const;
};

struct Transfer {
  bool sending;
  uint32_t peer;
  char* data;
  uint64_t bytes;
  uint64_t done = 0, header_done = 0;
  Header header{};

  bool finished() const { return header_done == sizeof header && done == bytes; }
};

inline Transfer sending(uint32_t peer, const void* data, uint64_t bytes) {
  return {true, peer, static_cast<char*>(const_cast<void*>(data)), bytes};
}
inline Transfer receiving(uint32_t peer, void* data, uint64_t bytes) {
  return {false, peer, static_cast<char*>(data), bytes};
}

// A link that an operator needs: to a peer, for messages that `topic` distinguishes from those of other operators.
struct LinkRequest {
  uint32_t peer;
  std::string topic;
};

class Communicator {
 public:
  // Meets the other ranks; throws Failure. `name` may be empty: then the root's token makes one.
  Communicator(const RootInfo& root, uint32_t ranks, uint32_t rank, std::string name, double exec_limit);
  ~Communicator();

  uint32_t size() const { return static_cast<uint32_t>(members_.size()); }
  uint32_t rank() const { return rank_; }
  const std::string& name() const { return name_; }
  double exec_limit() const { return exec_limit_; }

  // Makes the links that this communicator does not have yet, with the peers that call the same operator: blocks the host
  // for up to link_limit(), also where a peer is gone. Throws HCCL_E_TIMEOUT, HCCL_E_INTERNAL where it is destroyed.
  void set_up_links(const char* operation, const std::vector<LinkRequest>& wanted);
  void set_up_links(Kind kind, bool large);  // of a collective, by the algorithm for its size: with all others

  // Lives as long as a call of the host: while there is one that is not stuck in link set-up, HcclCommDestroy answers
  // HCCL_E_AGAIN.
  class HostCall {
   public:
    explicit HostCall(Communicator& comm);
    ~HostCall();
    HostCall(const HostCall&) = delete;

   private:
    Communicator& comm_;
  };
  bool in_use() const;

  // Runs one operation on the calling thread, one at a time: an error of it becomes the communicator's.
  aclError run(const std::function<void()>& body);

  // Moves all messages; those of one pair and direction in the order given. For use in run().
  void move(const Operation& operation, std::vector<Transfer> transfers);

  // The code with which it has failed, and why.
  HcclResult state(std::string* why = nullptr) const;
  // What HcclGetCommAsyncError answers: errors of RDMA only, which is between nodes.
  HcclResult async_error() const;
  void suspend(bool on) { suspended_ = on; }
  bool suspended() const { return suspended_; }

  // Ends what runs with an error, notifies the peers, closes the connections. More than once does no harm.
  void destroy();

  // Root information that the first of `ranks` (of this communicator) has made, for a communicator among them.
  RootInfo share_root(const std::vector<uint32_t>& ranks, uint64_t id);

 private:
  class LinkSetup;
  void connect(const Fd& listener, Token token);
  bool advance(Transfer& transfer, const Operation& operation);
  void check_header(const Transfer& transfer, const Operation& operation);
  [[noreturn]] void time_out(const std::vector<Transfer>& transfers, const Operation& operation) const;
  void check_open() const;
  void stay_silent();
  bool sees_end_of(const Link& link) const;
  void fail(const Failure& failure, bool notify_peers);

  const uint32_t rank_;
  std::shared_ptr<Fd> npu_port_;
  const double exec_limit_;
  std::string name_;
  std::vector<Member> members_;
  std::shared_ptr<Segment> segment_;
  std::vector<std::shared_ptr<Link>> links_;  // by rank

  std::mutex running_;  // one operation at a time
  std::atomic<bool> destroyed_{false}, suspended_{false};
  mutable std::mutex state_mutex_;
  HcclResult state_ = HCCL_SUCCESS;
  std::string state_text_;

  mutable std::mutex calls_mutex_;  // guards the three below
  size_t calls_ = 0;                // of the host
  std::multiset<Clock::time_point> linking_;  // when those of them began that set up links
  std::set<std::pair<uint32_t, std::string>> made_;
};

// CANN's name of a type, or its number.
std::string type_name(HcclDataType type);

}  // namespace softnpu::hccl
