// Threads of Ray that share the processor with the software NPU.
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

namespace {

// In each process that has a channel to another node, two threads wait for its messages (Ray 2.60, PollWriterClosure).
bool waits_for_channels() {
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  return std::strncmp(name, "worker.channel", 14) == 0;
}

}  // namespace

// Those threads poll without a pause, one core each, which a real host can spare. Here two cores serve all the nodes,
// their NPUs and the engine, and Linux 6.18 lets a thread that yields so often starve the others. They sleep.
extern "C" int sched_yield() noexcept {
  static thread_local const bool sleeps = waits_for_channels();
  if (!sleeps) return static_cast<int>(syscall(SYS_sched_yield));
  constexpr timespec pause{0, 200'000};
  return nanosleep(&pause, nullptr);
}
