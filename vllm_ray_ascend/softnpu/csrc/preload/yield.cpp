// Threads of Ray that share the processor with the software NPU.
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

namespace {

// Of each process that has a channel to another node, two threads wait for what goes there (Ray 2.60, PollWriterClosure).
bool waits_for_channels() {
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  return std::strncmp(name, "worker.channel", 14) == 0;
}

}  // namespace

// Those threads ask again as fast as they can, a core each, which a node's host has: here two cores are all that the nodes,
// their NPUs and the engine have, and Linux 6.18 lets whoever gives up his turn so often starve the others. They sleep.
extern "C" int sched_yield() noexcept {
  static thread_local const bool sleeps = waits_for_channels();
  if (!sleeps) return static_cast<int>(syscall(SYS_sched_yield));
  constexpr timespec pause{0, 200'000};
  return nanosleep(&pause, nullptr);
}
