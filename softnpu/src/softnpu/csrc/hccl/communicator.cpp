#include "hccl/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "hccl/poller.h"

namespace softnpu::hccl {
namespace {

// From then on a call that sets up links counts as stuck. CANN documents that a communicator that is stuck there can be
// destroyed, and one that is being linked cannot, but not where the border is.
constexpr auto kStuck = std::chrono::seconds(1);

}  // namespace

Communicator::Communicator(const RootInfo& root, uint32_t ranks, uint32_t rank, std::string name, double exec_limit)
    : rank_(rank), exec_limit_(exec_limit), name_(std::move(name)), segment_(Segment::create(ranks)) {
  if (ranks > 1 && strict("npu-ports")) npu_port_ = hold_npu_port(physical_device());
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
  for (const auto& link : remote) link->abandon();
  segment_->doorbell().ring();
  Poller::instance().remove(remote);
  npu_port_.reset();
  count_communicators(-1);
  log(2, "HCCL communicator %s: rank %u is destroyed", name_.c_str(), rank_);
}

// ---- links

Communicator::HostCall::HostCall(Communicator& comm) : comm_(comm) {
  std::lock_guard<std::mutex> lock(comm_.calls_mutex_);
  comm_.calls_++;
}

Communicator::HostCall::~HostCall() {
  std::lock_guard<std::mutex> lock(comm_.calls_mutex_);
  comm_.calls_--;
}

bool Communicator::in_use() const {
  if (fault("destroy_again", {{"comm", name_}})) return true;
  if (!strict("destroy-again")) return false;
  std::lock_guard<std::mutex> lock(calls_mutex_);
  auto stuck = std::distance(linking_.begin(), linking_.lower_bound(Clock::now() - kStuck));
  return calls_ > static_cast<size_t>(stuck);
}

// The links that one call is making: they exist afterwards only where it has made all of them.
class Communicator::LinkSetup {
 public:
  LinkSetup(Communicator& comm, const std::vector<LinkRequest>& wanted) : comm_(comm) {
    std::lock_guard<std::mutex> lock(comm_.calls_mutex_);
    began_ = comm_.linking_.insert(Clock::now());
    for (const auto& link : wanted)
      if (link.peer != comm_.rank_ && comm_.made_.insert({link.peer, link.topic}).second) links.push_back(link);
  }
  ~LinkSetup() {
    std::lock_guard<std::mutex> lock(comm_.calls_mutex_);
    comm_.linking_.erase(began_);
    for (const auto& link : links)
      if (!made) comm_.made_.erase({link.peer, link.topic});
  }
  LinkSetup(const LinkSetup&) = delete;

  std::vector<LinkRequest> links;
  bool made = false;

 private:
  Communicator& comm_;
  std::multiset<Clock::time_point>::iterator began_;
};

void Communicator::set_up_links(Kind kind, bool large) {
  std::vector<LinkRequest> links;
  std::string algorithm = std::string(kind_name(kind)) + (large ? " large" : "");
  for (uint32_t peer = 0; peer < size(); peer++) links.push_back({peer, algorithm});
  set_up_links(kind_name(kind), links);
}

void Communicator::set_up_links(const char* operation, const std::vector<LinkRequest>& wanted) {
  if (!strict("link-setup")) return;
  LinkSetup setup(*this, wanted);
  if (setup.links.empty()) return;
  Deadline deadline(link_limit());
  auto injected = fault("link_setup", {{"rank", std::to_string(rank_)}, {"comm", name_}, {"op", operation}});
  if (injected && injected->count("code"))
    throw Failure(static_cast<HcclResult>(atoi(injected->at("code").c_str())),
                  std::string("no link for ") + operation + ": injected by SOFTNPU_FAULTS");
  const Link* late = nullptr;
  if (!injected)
    for (const auto& [peer, topic] : setup.links) links_[peer]->post(Frame::kMessage, "link " + topic + ";");
  for (const auto& [peer, topic] : setup.links)
    if (!links_[peer]->await_message((injected ? "never " : "link ") + topic + ";", deadline)) late = links_[peer].get();
  if (destroyed_) throw Failure(HCCL_E_INTERNAL, "Terminating operation due to external request: it was destroyed");
  setup.made = !late;
  if (setup.made) return;
  char seconds[32];
  snprintf(seconds, sizeof seconds, "%g", link_limit());
  throw Failure(HCCL_E_TIMEOUT, std::string("EI0006: no link for ") + operation + " to " + late->peer() + " within " +
                                    seconds + " s (HCCL_CONNECT_TIMEOUT + 20 s, or SOFTNPU_CONNECT_TIMEOUT): it has not "
                                    "called the operator that belongs to this one (to a send, its receive)");
}

// ---- state

// A mismatch that a peer reports fails this rank too, whether or not it waits for that peer. Other failures of a peer
// matter only when this rank waits for it: a peer that has finished its part may exit.
HcclResult Communicator::state(std::string* why) const {
  {
    std::lock_guard<std::mutex> lock(state_mutex_);
    if (why) *why = state_text_;
    if (state_ != HCCL_SUCCESS) return state_;
  }
  for (const auto& link : links_) {
    if (!link->broken()) continue;
    LinkFailure failure = link->failure();
    if (failure.code != HCCL_E_PARA) continue;
    if (why) *why = failure.text;
    return failure.code;
  }
  return HCCL_SUCCESS;
}

HcclResult Communicator::async_error() const {
  if (fault("rdma_error", {{"rank", std::to_string(rank_)}, {"comm", name_}})) return HCCL_E_REMOTE;
  HcclResult code = state();
  if (!strict("async-error") || code == HCCL_SUCCESS) return code;
  for (uint32_t peer = 0; peer < size(); peer++)
    if (code == HCCL_E_REMOTE && links_[peer]->broken() && members_[peer].node != members_[rank_].node) return code;
  return HCCL_SUCCESS;
}

void Communicator::fail(const Failure& failure, bool notify_peers) {
  {
    std::lock_guard<std::mutex> lock(state_mutex_);
    if (state_ != HCCL_SUCCESS) return;
    state_ = failure.code;
    state_text_ = failure.what();
  }
  if (!notify_peers) return;
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
    std::string bytes = links_[ranks.front()]->take_message(topic.bytes(), Deadline(connect_limit()));
    return RootInfo::parse(bytes.data(), bytes.size());
  }
  RootInfo root = open_root();
  for (uint32_t rank : ranks)
    if (rank != rank_) links_[rank]->post(Frame::kMessage, topic.bytes() + root.bytes());
  return root;
}

}  // namespace softnpu::hccl
