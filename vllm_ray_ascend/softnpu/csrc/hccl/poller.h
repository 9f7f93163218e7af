// The one thread of a process that moves bytes between connections and rings, and notices when a peer goes. It runs
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
  // There is something to send. From any thread; costs little when told twice.
  void poke(std::shared_ptr<Link> link);
  // Sends what was posted, as far as the sockets take it at once, and closes them; they are closed when this returns.
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
  std::vector<std::shared_ptr<Link>> added_, poked_, removed_;
  bool running_ = false;
  uint64_t requests_ = 0, obeyed_ = 0;  // calls of remove()
  Fd wakeup_;

  // The thread's own.
  Fd epoll_;
  std::map<Link*, Watched> watched_;
};

}  // namespace softnpu::hccl
