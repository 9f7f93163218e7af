// Threads of torch_npu that share the processor with the software NPU.
#include <dirent.h>

#include <fstream>
#include <string>

#include "runtime/core.h"

namespace softnpu {

// torch_npu's release thread polls with sleeps of one microsecond, which Linux extends to about 60: a tenth of a core in
// each process, all of its life. On an NPU's host that does not matter; here it slows down the emulated NPU. With this
// timer slack it polls a thousand times a second. Only root may set it for another thread; otherwise nothing changes.
void slow_release_thread_polling() {
  constexpr const char* slack_ns = "1000000";
  DIR* threads = opendir("/proc/self/task");
  if (!threads) return;
  while (dirent* entry = readdir(threads)) {
    std::string name, id = entry->d_name;
    std::ifstream("/proc/self/task/" + id + "/comm") >> name;
    if (name == "release_thread") std::ofstream("/proc/" + id + "/timerslack_ns") << slack_ns;
  }
  closedir(threads);
}

}  // namespace softnpu
