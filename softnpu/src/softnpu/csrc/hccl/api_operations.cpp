// The C functions of HCCL that communicate. Each checks its arguments immediately and appends the work to the stream.
#include <set>

#include "hccl/collectives.h"
#include "hccl/handles.h"

namespace softnpu::hccl {
namespace {

using Body = std::function<void(Communicator&)>;

constexpr uint64_t kSmallCollective = 256 << 10;

// `prepare` checks the arguments against the communicator, and returns the work; `link` makes the links that it needs.
template <class Link, class Prepare>
HcclResult submit_linked(const char* call, HcclComm handle, aclrtStream stream, Link link, Prepare prepare) {
  return guarded(call, [&] {
    auto comm = find(handle);
    Communicator::HostCall host_call(*comm);
    require(!comm->suspended(), HCCL_E_SUSPENDING,
            "communicator " + comm->name() + " is suspended: call HcclCommResume");
    std::string why;
    HcclResult state = comm->state(&why);
    require(state == HCCL_SUCCESS, state, "communicator " + comm->name() + " failed earlier: " + why);
    Body body = prepare(*comm);
    link(*comm);
    if (capturing(stream) && reserve_graph_stream(stream, comm.get()) != ACL_SUCCESS)
      throw Failure(HCCL_E_RUNTIME, last_error());
    auto task = [comm, body] { return comm->run([&] { body(*comm); }); };
    if (enqueue(stream, call, task) != ACL_SUCCESS) throw Failure(HCCL_E_RUNTIME, last_error());
  });
}

// `bytes`: of a collective that HCCL does in one of two ways, each with links of its own, 0 for others.
template <class Prepare>
HcclResult submit(const char* call, Kind kind, HcclComm handle, aclrtStream stream, Prepare prepare, uint64_t bytes = 0) {
  auto link = [=](Communicator& comm) { comm.set_up_links(kind, bytes > kSmallCollective); };
  return submit_linked(call, handle, stream, link, prepare);
}

const char* from(const void* data) { return static_cast<const char*>(data); }
char* to(void* data) { return static_cast<char*>(data); }
// The outputs of HcclAlltoAll* are declared const.
char* to(const void* data) { return static_cast<char*>(const_cast<void*>(data)); }

// Empty tensors have no address.
void check_buffer(const void* data, uint64_t count, const char* which) {
  require(data || count == 0, HCCL_E_PTR, std::string("the ") + which + " buffer is null");
}

void check_array(const void* array) { require(array, HCCL_E_PTR, "an array of counts or displacements is null"); }

void check_type(HcclDataType type) {
  require(size_of(type) > 0, HCCL_E_PARA, "there is no data type " + std::to_string(static_cast<int>(type)));
}

void check_reduction(HcclDataType type, HcclReduceOp op) {
  check_type(type);
  require(can_reduce(type), HCCL_E_NOT_SUPPORT, "reductions of " + type_name(type) + " are not supported");
  require(op >= HCCL_REDUCE_SUM && op <= HCCL_REDUCE_MIN, HCCL_E_PARA,
          "there is no reduction " + std::to_string(static_cast<int>(op)));
}

void check_rank(const Communicator& comm, uint32_t rank) {
  require(rank < comm.size(), HCCL_E_PARA,
          "there is no rank " + std::to_string(rank) + " in communicator " + comm.name() + " of " +
              std::to_string(comm.size()));
}

HcclResult all_to_all_call(const char* call, const void* send, const std::function<Layout(Communicator&)>& out,
                           HcclDataType send_type, const void* receive, const std::function<Layout(Communicator&)>& in,
                           HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  return submit(call, Kind::kAllToAll, comm, stream, [&](Communicator& c) -> Body {
    check_type(send_type);
    check_type(receive_type);
    Layout outgoing = out(c), incoming = in(c);
    for (uint32_t rank = 0; rank < c.size(); rank++) {
      check_buffer(send, outgoing.counts[rank], "send");
      check_buffer(receive, incoming.counts[rank], "receive");
    }
    uint64_t kept = outgoing.counts[c.rank()] * size_of(send_type),
             expected = incoming.counts[c.rank()] * size_of(receive_type);
    require(kept == expected, HCCL_E_PARA,
            "the rank sends " + std::to_string(kept) + " bytes to itself, and expects " + std::to_string(expected));
    return [=](Communicator& comm) {
      all_to_all(comm, from(send), outgoing, send_type, to(receive), incoming, receive_type);
    };
  });
}

// The links of sends and receives: one for each direction of a pair, or for a batch one for each pair.
std::vector<LinkRequest> links_of(const std::vector<HcclSendRecvItem>& items, uint32_t self, bool batch) {
  std::vector<LinkRequest> links;
  for (const auto& item : items) {
    bool sends = item.sendRecvType == HCCL_SEND;
    uint32_t sender = sends ? self : item.remoteRank, receiver = sends ? item.remoteRank : self;
    std::string direction = std::to_string(sender) + ">" + std::to_string(receiver);
    links.push_back({item.remoteRank, batch ? "BatchSendRecv" : direction});
  }
  return links;
}

// CANN up to 8.5: "The task list must not contain duplicate sending or receiving tasks pointed to the same rank".
void check_batch(const std::vector<HcclSendRecvItem>& items) {
  std::set<std::pair<int, uint32_t>> seen;
  for (const auto& item : items)
    require(seen.insert({item.sendRecvType, item.remoteRank}).second || !strict("batch-one-item-per-peer"), HCCL_E_PARA,
            "two items " + std::string(item.sendRecvType == HCCL_SEND ? "send to" : "receive from") + " rank " +
                std::to_string(item.remoteRank));
}

HcclResult send_receive_call(const char* call, const std::vector<HcclSendRecvItem>& items, HcclComm comm,
                             aclrtStream stream, bool batch = false) {
  auto link = [&](Communicator& c) {
    c.set_up_links(batch ? "BatchSendRecv" : kind_name(Kind::kSendRecv), links_of(items, c.rank(), batch));
  };
  return submit_linked(call, comm, stream, link, [&](Communicator& c) -> Body {
    if (batch) check_batch(items);
    for (const auto& item : items) {
      require(item.sendRecvType == HCCL_SEND || item.sendRecvType == HCCL_RECV, HCCL_E_PARA,
              "an item neither sends nor receives");
      check_type(item.dataType);
      check_buffer(item.buf, item.count, item.sendRecvType == HCCL_SEND ? "send" : "receive");
      check_rank(c, item.remoteRank);
    }
    return [items](Communicator& comm) { send_receive(comm, items); };
  });
}

// Sends and receives between HcclGroupStart and HcclGroupEnd, by communicator and stream.
struct Group {
  struct Batch {
    HcclComm comm;
    aclrtStream stream;
    std::vector<HcclSendRecvItem> items;
  };
  int depth = 0;
  std::vector<Batch> batches;

  void add(HcclComm comm, aclrtStream stream, const HcclSendRecvItem& item) {
    for (auto& batch : batches)
      if (batch.comm == comm && batch.stream == stream) return batch.items.push_back(item);
    batches.push_back({comm, stream, {item}});
  }
};
thread_local Group t_group;

HcclResult single(const char* call, const HcclSendRecvItem& item, HcclComm comm, aclrtStream stream) {
  if (t_group.depth == 0) return send_receive_call(call, {item}, comm, stream);
  t_group.add(comm, stream, item);
  return HCCL_SUCCESS;
}

}  // namespace
}  // namespace softnpu::hccl

using namespace softnpu::hccl;

extern "C" {

// HCCL answers success to an operation on no elements, before it looks at anything else: no link is made.

HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm,
                         aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kAllReduce, comm, stream, [&](Communicator&) -> Body {
    check_reduction(type, op);
    check_buffer(send, count, "send");
    check_buffer(receive, count, "receive");
    return [=](Communicator& c) { all_reduce(c, from(send), to(receive), count, type, op); };
  }, count * size_of(type));
}

HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root,
                      HcclComm comm, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kReduce, comm, stream, [&](Communicator& c) -> Body {
    check_reduction(type, op);
    check_rank(c, root);
    check_buffer(send, count, "send");
    if (c.rank() == root) check_buffer(receive, count, "receive");
    return [=](Communicator& c) { reduce_to(c, from(send), to(receive), count, type, op, root); };
  });
}

HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                         aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kBroadcast, comm, stream, [&](Communicator& c) -> Body {
    check_type(type);
    check_rank(c, root);
    check_buffer(data, count, "data");
    return [=](Communicator& c) { broadcast(c, to(data), count, type, root); };
  }, count * size_of(type));
}

HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm,
                         aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kAllGather, comm, stream, [&](Communicator&) -> Body {
    check_type(type);
    check_buffer(send, count, "send");
    check_buffer(receive, count, "receive");
    return [=](Communicator& c) { all_gather(c, from(send), count, to(receive), Layout::even(c.size(), count), type); };
  }, count * size_of(type));
}

HcclResult HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* displacements,
                          HcclDataType type, HcclComm comm, aclrtStream stream) {
  return submit(__func__, Kind::kAllGather, comm, stream, [&](Communicator& c) -> Body {
    check_type(type);
    check_array(counts);
    check_array(displacements);
    Layout layout = Layout::copy(counts, displacements, c.size());
    require(layout.counts[c.rank()] == count, HCCL_E_PARA, "the rank's own count differs from what it sends");
    check_buffer(send, count, "send");
    for (uint64_t each : layout.counts) check_buffer(receive, each, "receive");
    return [=](Communicator& c) { all_gather(c, from(send), count, to(receive), layout, type); };
  });
}

HcclResult HcclReduceScatter(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                             HcclComm comm, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kReduceScatter, comm, stream, [&](Communicator&) -> Body {
    check_reduction(type, op);
    check_buffer(send, count, "send");
    check_buffer(receive, count, "receive");
    return
        [=](Communicator& c) { reduce_scatter(c, from(send), Layout::even(c.size(), count), to(receive), type, op); };
  }, count * size_of(type));
}

HcclResult HcclReduceScatterV(void* send, const void* counts, const void* displacements, void* receive, uint64_t count,
                              HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return submit(__func__, Kind::kReduceScatter, comm, stream, [&](Communicator& c) -> Body {
    check_reduction(type, op);
    check_array(counts);
    check_array(displacements);
    Layout layout = Layout::copy(counts, displacements, c.size());
    require(layout.counts[c.rank()] == count, HCCL_E_PARA, "the rank's own count differs from what it receives");
    for (uint64_t each : layout.counts) check_buffer(send, each, "send");
    check_buffer(receive, count, "receive");
    return [=](Communicator& c) { reduce_scatter(c, from(send), layout, to(receive), type, op); };
  });
}

HcclResult HcclScatter(void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                       aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return submit(__func__, Kind::kScatter, comm, stream, [&](Communicator& c) -> Body {
    check_type(type);
    check_rank(c, root);
    if (c.rank() == root) check_buffer(send, count, "send");
    check_buffer(receive, count, "receive");
    return [=](Communicator& c) { scatter(c, from(send), to(receive), count, type, root); };
  });
}

HcclResult HcclAlltoAll(const void* send, uint64_t send_count, HcclDataType send_type, const void* receive,
                        uint64_t receive_count, HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  auto out = [=](Communicator& c) { return Layout::even(c.size(), send_count); };
  auto in = [=](Communicator& c) { return Layout::even(c.size(), receive_count); };
  return all_to_all_call(__func__, send, out, send_type, receive, in, receive_type, comm, stream);
}

HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_displacements,
                         HcclDataType send_type, const void* receive, const void* receive_counts,
                         const void* receive_displacements, HcclDataType receive_type, HcclComm comm,
                         aclrtStream stream) {
  auto layout = [](const void* counts, const void* displacements) {
    return [=](Communicator& c) {
      check_array(counts);
      check_array(displacements);
      return Layout::copy(counts, displacements, c.size());
    };
  };
  return all_to_all_call(__func__, send, layout(send_counts, send_displacements), send_type, receive,
                         layout(receive_counts, receive_displacements), receive_type, comm, stream);
}

// matrix[i][j] elements go from rank i to rank j; blocks lie one after the other.
HcclResult HcclAlltoAllVC(const void* send, const void* matrix, HcclDataType send_type, const void* receive,
                          HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  auto layout = [=](bool out) {
    return [=](Communicator& c) {
      check_array(matrix);
      auto* counts = static_cast<const uint64_t*>(matrix);
      Layout result;
      uint64_t at = 0;
      for (uint32_t peer = 0; peer < c.size(); peer++) {
        uint64_t count = counts[out ? c.rank() * c.size() + peer : peer * c.size() + c.rank()];
        result.counts.push_back(count);
        result.displacements.push_back(at);
        at += count;
      }
      return result;
    };
  };
  return all_to_all_call(__func__, send, layout(true), send_type, receive, layout(false), receive_type, comm, stream);
}

HcclResult HcclSend(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return single(__func__, {HCCL_SEND, data, count, type, peer}, comm, stream);
}

HcclResult HcclRecv(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  return single(__func__, {HCCL_RECV, data, count, type, peer}, comm, stream);
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
  if (!items) return guarded(__func__, [] { throw Failure(HCCL_E_PTR, "the list of items is null"); });
  return send_receive_call(__func__, {items, items + count}, comm, stream, true);
}

HcclResult HcclGroupStart() {
  t_group.depth++;
  return HCCL_SUCCESS;
}

// The first error, if any; what could be appended to a stream has been.
HcclResult HcclGroupEnd() {
  if (t_group.depth == 0)
    return guarded(__func__, [] { throw Failure(HCCL_E_PARA, "there is no HcclGroupStart to end"); });
  if (--t_group.depth > 0) return HCCL_SUCCESS;
  HcclResult result = HCCL_SUCCESS;
  for (const auto& batch : std::exchange(t_group.batches, {})) {
    HcclResult code = send_receive_call(__func__, batch.items, batch.comm, batch.stream);
    if (result == HCCL_SUCCESS) result = code;
  }
  return result;
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  return submit(__func__, Kind::kBarrier, comm, stream, [](Communicator&) -> Body { return [](Communicator& c) { barrier(c); }; });
}

}  // extern "C"
