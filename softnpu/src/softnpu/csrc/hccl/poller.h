// The one thread of a process that moves bytes between connections and rings, and detects when a peer exits. It runs
// while there is a link.
#pragma once

#include <map>
#include <vector>

#include "hccl/link.h"

namespace softnpu::hccl {

class Poller {
 public:
  static Poller& instance();
  void add(std::shared_ptr<Link> link);
  // Signals that there is something to send. Called from any thread; repeated calls are cheap.
  void schedule(std::shared_ptr<Link> link);
  // Sends what was posted, as far as the sockets accept it without waiting, and closes them before it returns.
  void remove(const std::vector<std::shared_ptr<Link>>& links);

 private:
  struct Watched {
    std::shared_ptr<Link> link;
    int fd;
    bool for_output;
  };
  void run();
  bool obey();
  void serve(Watched& watched, uint32_t events);
  void wake();
  int next_timeout() const;

  std::mutex mutex_;  // guards the following
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Link>> added_, scheduled_, removed_;
  bool running_ = false;
  uint64_t requests_ = 0, handled_ = 0;  // calls of remove()
  Fd wakeup_;

  // The thread's own.
  Fd epoll_;
  std::map<Link*, Watched> watched_;
};

}  // namespace softnpu::hccl
