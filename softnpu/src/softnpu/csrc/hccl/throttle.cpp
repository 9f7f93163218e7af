#include "hccl/throttle.h"

#include <cstdlib>

namespace softnpu::hccl {

uint64_t LinkThrottle::released(uint64_t end) {
  auto now = Clock::now();
  if (end > seen_) {
    if (held_.empty() && now - asked_ > std::chrono::milliseconds(100)) read_fault();
    asked_ = now;
    auto busy = std::chrono::duration<double>(static_cast<double>(end - seen_) * seconds_per_byte_);
    link_free_ = std::max(link_free_, now) + std::chrono::duration_cast<Clock::duration>(busy);
    held_.push_back({end, link_free_ + delay_});
    seen_ = end;
  }
  for (; !held_.empty() && held_.front().due <= now; held_.pop_front()) released_ = held_.front().end;
  return released_;
}

std::optional<Clock::time_point> LinkThrottle::due() const {
  if (held_.empty()) return std::nullopt;
  return held_.front().due;
}

void LinkThrottle::read_fault() {
  auto found = fault("slow_link");
  auto number = [&](const char* name) { return found && found->count(name) ? atof(found->at(name).c_str()) : 0.0; };
  delay_ = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(number("ms")));
  double bytes_per_second = number("mbps") * 1e6 / 8;
  seconds_per_byte_ = bytes_per_second > 0 ? 1 / bytes_per_second : 0;
}

}  // namespace softnpu::hccl
