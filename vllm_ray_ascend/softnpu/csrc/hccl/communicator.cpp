#include "hccl/communicator.h"

#include <unistd.h>

#include <algorithm>

#include "hccl/poller.h"

namespace softnpu::hccl {

Communicator::Communicator(const RootInfo& root, uint32_t ranks, uint32_t rank, std::string name, double exec_limit)
    : rank_(rank), exec_limit_(exec_limit), name_(std::move(name)), segment_(Segment::create(ranks)) {
  if (name_.empty()) name_ = "hccl_" + std::to_string(root.token);
  Member self;
  self.rank = rank;
  self.pid = getpid();
  self.device = physical_device();
  self.segment_fd = segment_->fd();
  self.segment_nonce = segment_->nonce();
  self.node = node_key();
  Fd listener = listen_here(self.address);
  members_ = join(root, ranks, self);
  connect(listener, root.token);
  segment_->seal();
  count_communicators(1);
  auto shared = std::count_if(links_.begin(), links_.end(), [](const auto& link) { return link->shared(); }) -
                1;  // not with itself
  log(2, "HCCL communicator %s: rank %u of %u is ready, sharing memory with %d others", name_.c_str(), rank_, ranks,
      static_cast<int>(shared));
}

Communicator::~Communicator() { destroy(); }

// Two ranks share memory if both can map the other's: separate views of /proc may hide one from the other.
void Communicator::connect(const Fd& listener, Token token) {
  Deadline deadline(connect_limit());
  auto sockets = connect_members(members_, rank_, listener, token, deadline);
  std::vector<std::shared_ptr<Segment>> segments(members_.size());
  auto same_node = [&](const Member& peer) { return peer.rank != rank_ && peer.node == members_[rank_].node; };
  for (const auto& peer : members_) {
    if (!same_node(peer)) continue;
    segments[peer.rank] = Segment::open(peer.pid, peer.segment_fd, peer.segment_nonce, size());
    send_frame(sockets[peer.rank].get(), segments[peer.rank] ? "mapped" : "", deadline);
  }
  for (const auto& peer : members_)
    if (same_node(peer) && receive_frame(sockets[peer.rank].get(), deadline).empty()) segments[peer.rank] = nullptr;
  for (const auto& peer : members_) {
    uint32_t other = peer.rank;
    links_.push_back(other == rank_ ? std::make_shared<Link>(segment_)
                                    : std::make_shared<Link>(std::move(sockets[other]), peer.text(), rank_, other,
                                                             segment_, segments[other]));
  }
  for (const auto& peer : members_)
    if (peer.rank != rank_) Poller::instance().add(links_[peer.rank]);
}

void Communicator::destroy() {
  if (destroyed_.exchange(true)) return;
  if (members_[rank_].pid != getpid()) return;  // a forked child: connections and poller are its parent's
  std::vector<std::shared_ptr<Link>> remote;
  for (uint32_t peer = 0; peer < size(); peer++)
    if (peer != rank_) remote.push_back(links_[peer]);
  for (const auto& link : remote) link->post(Frame::kGoodbye, "");
  segment_->bell().ring();
  Poller::instance().remove(remote);
  count_communicators(-1);
  log(2, "HCCL communicator %s: rank %u is destroyed", name_.c_str(), rank_);
}

// ---- state

// A peer that reports a mismatch means us too, whether or not we wait for it. Other failures of a peer matter once we
// do: one that has done its part may go.
HcclResult Communicator::state(std::string* why) const {
  {
    std::lock_guard<std::mutex> lock(state_mutex_);
    if (why) *why = state_text_;
    if (state_ != HCCL_SUCCESS) return state_;
  }
  for (const auto& link : links_) {
    if (!link->broken()) continue;
    Breakage breakage = link->breakage();
    if (breakage.code != HCCL_E_PARA) continue;
    if (why) *why = breakage.text;
    return breakage.code;
  }
  return HCCL_SUCCESS;
}

void Communicator::fail(const Failure& failure, bool tell) {
  {
    std::lock_guard<std::mutex> lock(state_mutex_);
    if (state_ != HCCL_SUCCESS) return;
    state_ = failure.code;
    state_text_ = failure.what();
  }
  if (!tell) return;
  std::string notice = Writer().put(static_cast<uint32_t>(failure.code)).put(std::string(failure.what())).bytes();
  for (uint32_t peer = 0; peer < size(); peer++)
    if (peer != rank_) links_[peer]->post(Frame::kFailed, notice);
}

// ---- sub-communicators

RootInfo Communicator::share_root(const std::vector<uint32_t>& ranks, uint64_t id) {
  Writer topic;
  topic.put(id).put(static_cast<uint32_t>(ranks.size()));
  for (uint32_t rank : ranks) topic.put(rank);
  if (ranks.front() != rank_) {
    std::string bytes = links_[ranks.front()]->take_letter(topic.bytes(), Deadline(connect_limit()));
    return RootInfo::parse(bytes.data(), bytes.size());
  }
  RootInfo root = open_root();
  for (uint32_t rank : ranks)
    if (rank != rank_) links_[rank]->post(Frame::kLetter, topic.bytes() + root.bytes());
  return root;
}

}  // namespace softnpu::hccl
