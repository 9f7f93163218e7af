// The fault slow_link: holds bytes back as a link with that delay and bandwidth would (and a window of Ring::kBytes).
#pragma once

#include <deque>
#include <optional>

#include "hccl/common.h"

namespace softnpu::hccl {

class LinkThrottle {
 public:
  // How many of the bytes up to position `end` may leave now (a position too); `end` never falls.
  uint64_t released(uint64_t end);
  // When more will be released; none if nothing is held back.
  std::optional<Clock::time_point> due() const;

 private:
  struct Held {
    uint64_t end;
    Clock::time_point due;
  };
  void read_fault();

  std::deque<Held> held_;
  uint64_t seen_ = 0, released_ = 0;
  Clock::time_point link_free_, asked_;
  Clock::duration delay_{0};
  double seconds_per_byte_ = 0;
};

}  // namespace softnpu::hccl
