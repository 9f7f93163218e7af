#include "hccl/poller.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <cerrno>
#include <thread>

namespace softnpu::hccl {

// Never destroyed: its thread may outlive the static objects.
Poller& Poller::instance() {
  static auto* poller = new Poller;
  return *poller;
}

void Poller::wake() {
  uint64_t one = 1;
  if (wakeup_ && write(wakeup_.get(), &one, sizeof one) < 0)
    log(1, "HCCL: cannot wake the poller: %s", strerror(errno));
}

void Poller::add(std::shared_ptr<Link> link) {
  std::lock_guard<std::mutex> lock(mutex_);
  added_.push_back(std::move(link));
  if (!running_) {
    wakeup_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
    if (!wakeup_ || !epoll_)
      throw Failure(HCCL_E_SYSCALL, std::string("HCCL: no event descriptors: ") + strerror(errno));
    epoll_event event{};
    event.events = EPOLLIN;
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wakeup_.get(), &event);
    running_ = true;
    std::thread([this] { run(); }).detach();
  }
  wake();
}

void Poller::schedule(std::shared_ptr<Link> link) {
  if (link->scheduled.exchange(true)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!running_) {
    link->scheduled = false;
    return;
  }
  scheduled_.push_back(std::move(link));
  wake();
}

void Poller::remove(const std::vector<std::shared_ptr<Link>>& links) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!running_) return;
  removed_.insert(removed_.end(), links.begin(), links.end());
  uint64_t request = ++requests_;
  wake();
  changed_.wait(lock, [&] { return handled_ >= request; });
}

void Poller::run() {
  epoll_event events[64];
  while (obey()) {
    int count = epoll_wait(epoll_.get(), events, 64, next_timeout());
    for (int i = 0; i < count; i++) {
      auto* link = static_cast<Link*>(events[i].data.ptr);
      auto found = watched_.find(link);
      if (found != watched_.end()) serve(found->second, events[i].events);
    }
    auto now = Clock::now();
    for (auto& [link, watched] : watched_)
      if (auto due = link->due(); due && *due <= now) serve(watched, 0);
  }
}

// Handles the requests of other threads. Returns false when no link is left: the thread exits.
bool Poller::obey() {
  std::vector<std::shared_ptr<Link>> added, scheduled, removed;
  uint64_t requests;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t count;
    while (read(wakeup_.get(), &count, sizeof count) > 0) {
    }
    std::swap(added, added_);
    std::swap(scheduled, scheduled_);
    std::swap(removed, removed_);
    requests = requests_;
  }
  for (auto& link : added) {
    Watched watched{link, link->socket(), false};
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = link.get();
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, watched.fd, &event);
    watched_.emplace(link.get(), watched);
  }
  for (auto& link : scheduled) {
    link->scheduled = false;
    if (auto found = watched_.find(link.get()); found != watched_.end()) serve(found->second, 0);
  }
  for (auto& link : removed)
    if (watched_.erase(link.get()) > 0) link->close();
  std::lock_guard<std::mutex> lock(mutex_);
  handled_ = requests;
  bool go_on = !watched_.empty() || !added_.empty() || handled_ < requests_;
  if (!go_on) {
    running_ = false;
    wakeup_.close();
    epoll_.close();
  }
  changed_.notify_all();
  return go_on;
}

// Reading first: what came may be the credit that writing waits for. A link that is lost closes its socket, which takes
// it out of the epoll set.
void Poller::serve(Watched& watched, uint32_t events) {
  Link& link = *watched.link;
  if (events != 0) link.read_input();
  link.write_output();
  if (link.socket() < 0 || link.blocked() == watched.for_output) return;
  watched.for_output = link.blocked();
  epoll_event event{};
  event.events = EPOLLIN | (watched.for_output ? static_cast<uint32_t>(EPOLLOUT) : 0u);
  event.data.ptr = &link;
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, watched.fd, &event);
}

int Poller::next_timeout() const {
  std::optional<Clock::time_point> next;
  for (const auto& [link, watched] : watched_)
    if (auto due = link->due(); due && (!next || *due < *next)) next = due;
  if (!next) return -1;
  auto left = std::chrono::duration_cast<std::chrono::milliseconds>(*next - Clock::now()).count();
  return left < 0 ? 0 : static_cast<int>(left) + 1;
}

}  // namespace softnpu::hccl
