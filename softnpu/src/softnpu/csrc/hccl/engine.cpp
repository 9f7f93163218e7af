// How a communicator runs operations: every one is a set of messages, which one loop on the stream's thread moves.
#include "hccl/communicator.h"

namespace softnpu::hccl {
namespace {

// A failure that is not reported to the peers: another rank has reported it, or this one is made silent by a fault.
struct QuietFailure : Failure {
  using Failure::Failure;
};

aclError task_code(HcclResult code) {
  return code == HCCL_E_TIMEOUT ? ACL_ERROR_RT_TASK_TIMEOUT : ACL_ERROR_RT_DRV_INTERNAL_ERROR;
}

bool same(const Operation& a, const Operation& b) {
  return a.kind == b.kind && a.type == b.type && a.reduce == b.reduce && a.root == b.root && a.total == b.total;
}

}  // namespace

const char* kind_name(Kind kind) {
  static const char* const names[] = {"?",       "AllReduce", "Reduce",    "Broadcast", "AllGather", "ReduceScatter",
                                      "Scatter", "AlltoAll",  "Send/Recv", "Barrier"};
  auto index = static_cast<uint32_t>(kind);
  return index < std::size(names) ? names[index] : "?";
}

std::string Operation::text() const {
  static const char* const reductions[] = {"sum", "prod", "max", "min"};
  std::string text = kind_name(kind);
  if (reduce < std::size(reductions)) text += std::string(" ") + reductions[reduce];
  if (type != HCCL_DATA_TYPE_RESERVED) text += " of " + type_name(type);
  if (root != UINT32_MAX) text += " with root " + std::to_string(root);
  if (total > 0) text += " of " + std::to_string(total) + " bytes in all";
  return text;
}

std::string Header::text() const {
  return operation.text() + ", " + std::to_string(bytes) + " bytes in message " + std::to_string(sequence);
}

aclError Communicator::run(const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(running_);
  std::string prefix = "communicator " + name_ + ", rank " + std::to_string(rank_) + ": ";
  auto failed = [&](const Failure& failure, bool notify_peers) {
    Failure whole(failure.code, prefix + failure.what());
    fail(whole, notify_peers);
    return softnpu::fail(task_code(whole.code), whole.what());
  };
  try {
    std::string why;
    if (HcclResult code = state(&why); code != HCCL_SUCCESS)
      return softnpu::fail(task_code(code), prefix + "failed earlier: " + why);
    check_open();
    if (fault("hccl_silent", {{"rank", std::to_string(rank_)}, {"comm", name_}})) stay_silent();
    body();
    return ACL_SUCCESS;
  } catch (const QuietFailure& failure) {
    return failed(failure, false);
  } catch (const Failure& failure) {
    return failed(failure, !destroyed_);
  }
}

void Communicator::check_open() const {
  if (destroyed_) throw Failure(HCCL_E_REMOTE, "the communicator has been destroyed");
}

void Communicator::stay_silent() {
  Deadline deadline(exec_limit_);
  for (;;) {
    uint32_t seen = segment_->doorbell().count();
    check_open();
    if (!segment_->doorbell().wait(seen, deadline))
      throw QuietFailure(HCCL_E_TIMEOUT, "silent because of the fault hccl_silent");
  }
}

// HCCL learns of the end of a process from errors of RDMA alone, which are between nodes.
bool Communicator::sees_end_of(const Link& link) const {
  if (!link.broken() || fault("unseen_death", {{"rank", std::to_string(rank_)}})) return false;
  return !link.shared() || link.failure().reported || !strict("peer-death");
}

void Communicator::move(const Operation& operation, std::vector<Transfer> transfers) {
  Deadline deadline(exec_limit_);
  Doorbell& doorbell = segment_->doorbell();
  // In order per pair: a transfer waits while an earlier one of its peer and direction is open.
  std::vector<bool> busy(2 * size());
  for (;;) {
    uint32_t seen = doorbell.count();
    bool open = false, moved = false;
    const Link* lost = nullptr;
    busy.assign(busy.size(), false);
    for (auto& transfer : transfers) {
      // Checked first: data that a peer sent before it exited still counts.
      bool gone = sees_end_of(*links_[transfer.peer]);
      if (transfer.finished() && (!transfer.sending || links_[transfer.peer]->flushed())) continue;
      open = true;
      size_t lane = 2 * transfer.peer + transfer.sending;
      if (busy[lane]) continue;
      bool step = !(gone && transfer.sending) && !transfer.finished() && advance(transfer, operation);
      moved = moved || step;
      if (gone && !step) lost = links_[transfer.peer].get();
      busy[lane] = !transfer.finished();
    }
    if (!open) return;
    check_open();
    if (moved) continue;
    if (lost) {
      LinkFailure failure = lost->failure();
      std::string text = operation.text() + ": " + failure.text;
      if (failure.reported) throw QuietFailure(failure.code, text);
      throw Failure(failure.code, text);
    }
    if (!doorbell.wait(seen, deadline)) time_out(transfers, operation);
  }
}

// Moves as much of one message as possible. Returns false if nothing could be moved.
bool Communicator::advance(Transfer& transfer, const Operation& operation) {
  Link& link = *links_[transfer.peer];
  auto* head = reinterpret_cast<char*>(&transfer.header);
  uint64_t before = transfer.header_done + transfer.done;
  if (!transfer.sending) link.expect_message();
  if (transfer.sending && before == 0 && !link.message_expected()) return false;
  if (transfer.sending) transfer.header = {operation, link.sent_messages, transfer.bytes};
  auto step = [&](char* data, uint64_t size, uint64_t done) {
    return done + (transfer.sending ? link.send(data + done, size - done) : link.receive(data + done, size - done));
  };
  if (transfer.header_done < sizeof(Header)) {
    transfer.header_done = step(head, sizeof(Header), transfer.header_done);
    if (!transfer.sending && transfer.header_done == sizeof(Header)) check_header(transfer, operation);
  }
  if (transfer.header_done == sizeof(Header)) transfer.done = step(transfer.data, transfer.bytes, transfer.done);
  if (transfer.finished()) (transfer.sending ? link.sent_messages : link.received_messages)++;
  bool moved = transfer.header_done + transfer.done > before;
  if (moved && transfer.sending) link.announce();
  return moved;
}

void Communicator::check_header(const Transfer& transfer, const Operation& operation) {
  Link& link = *links_[transfer.peer];
  Header expected{operation, link.received_messages, transfer.bytes};
  const Header& came = transfer.header;
  if (same(came.operation, operation) && came.sequence == expected.sequence && came.bytes == expected.bytes) return;
  throw Failure(HCCL_E_PARA, "the ranks do not run the same operation: rank " + std::to_string(rank_) + " expects " +
                                 expected.text() + "; rank " + std::to_string(transfer.peer) + " sends " + came.text());
}

void Communicator::time_out(const std::vector<Transfer>& transfers, const Operation& operation) const {
  std::string waited;
  std::vector<bool> named(size());
  for (const auto& transfer : transfers) {
    if (transfer.finished() && (!transfer.sending || links_[transfer.peer]->flushed())) continue;
    if (named[transfer.peer]) continue;
    named[transfer.peer] = true;
    waited += (waited.empty() ? "" : ", ") + links_[transfer.peer]->peer();
  }
  char seconds[32];
  snprintf(seconds, sizeof seconds, "%g", exec_limit_);
  throw Failure(HCCL_E_TIMEOUT, operation.text() + ": waited " + seconds + " s (HCCL_EXEC_TIMEOUT) for " + waited);
}

}  // namespace softnpu::hccl
