// Threads of torch_npu that share the processor with the software NPU.
#include <dirent.h>

#include <fstream>
#include <string>

#include "runtime/core.h"

namespace softnpu {

// torch_npu's release thread asks whether there is anything to release after every microsecond of sleep, which Linux makes
// about 60: a tenth of a core in each process, all of its life. On an NPU's host that is nothing; here it is taken from
// the NPU. With this slack it asks a thousand times a second. Only root may say so of another thread; else all stays.
void calm_release_thread() {
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
