// What the processes of one node hold of its devices, in one file of shared memory: bytes, streams, open
// devices, communicators. A slot whose process is gone does not count and is reused by the next process.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "runtime/core.h"

extern "C" void softnpu_leave_node();

namespace softnpu {
namespace {

constexpr int kSlots = 512;

struct Slot {
  std::atomic<int32_t> pid;
  std::atomic<int32_t> communicators;
  std::atomic<uint64_t> started;  // of the process, in clock ticks since boot: detects a reused pid
  std::atomic<uint64_t> open_devices;
  std::atomic<uint64_t> bytes[kMaxDevices];
  std::atomic<int32_t> streams[kMaxDevices];
};

struct Table {
  Slot slots[kSlots];
};

// Start time of a process (field 22 of /proc/PID/stat), 0 if it is gone or a zombie.
uint64_t start_time(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!getline(file, line)) return 0;
  std::istringstream fields(line.substr(line.rfind(')') + 2));
  std::string field;
  for (int index = 3; index <= 22 && fields >> field; index++)
    if (index == 3 && (field == "Z" || field == "X")) return 0;
  return strtoull(field.c_str(), nullptr, 10);
}

bool alive(const Slot& slot) {
  int pid = slot.pid;
  return pid > 0 && start_time(pid) == slot.started;
}

std::string table_path() {
  const char* folder = getenv("SOFTNPU_STATE_DIR");
  std::string name = node_key();
  for (char& letter : name)
    if (!isalnum(static_cast<unsigned char>(letter))) letter = '_';
  return std::string(folder && *folder ? folder : "/dev/shm") + "/softnpu-" + std::to_string(getuid()) + "-" + name;
}

class Mapping {
 public:
  Mapping() {
    // An exiting process may unlink the file between our open and our lock: then open the new one.
    for (struct stat info {};;) {
      fd_ = open(table_path().c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
      if (fd_ < 0) die("open");
      flock(fd_, LOCK_EX);
      if (fstat(fd_, &info) == 0 && info.st_nlink > 0) break;
      close(fd_);
    }
    if (ftruncate(fd_, sizeof(Table))) die("ftruncate");
    void* address = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (address == MAP_FAILED) die("mmap");
    table_ = static_cast<Table*>(address);
    claim();
    flock(fd_, LOCK_UN);
  }

  // The last process to leave removes the file, so that shared memory is not leaked.
  void leave() {
    static Slot aside;  // releases after this point must not touch the slot, which another process may own by then
    flock(fd_, LOCK_EX);
    Slot* left = mine_.exchange(&aside);
    if (left != &aside) left->pid = 0;
    bool last = true;
    for (auto& slot : table_->slots) last = last && !alive(slot);
    if (last) unlink(table_path().c_str());
    flock(fd_, LOCK_UN);
  }

  Table& table() { return *table_; }
  Slot& mine() { return *mine_; }
  bool ours() const { return owner_ == getpid(); }

 private:
  [[noreturn]] void die(const char* call) {
    fprintf(stderr, "softnpu: %s of %s failed: %s. Set SOFTNPU_STATE_DIR to a folder that can be written.\n", call,
            table_path().c_str(), strerror(errno));
    abort();
  }

  void claim() {
    for (auto& slot : table_->slots) {
      if (alive(slot)) continue;
      slot.open_devices = 0;
      slot.communicators = 0;
      for (int device = 0; device < kMaxDevices; device++) slot.bytes[device] = 0, slot.streams[device] = 0;
      owner_ = getpid();
      slot.started = start_time(owner_);
      slot.pid = owner_;
      mine_ = &slot;
      return;
    }
    fprintf(stderr, "softnpu: more than %d processes use the software NPUs of this node\n", kSlots);
    abort();
  }

  int fd_ = -1;
  int owner_ = 0;
  Table* table_ = nullptr;
  std::atomic<Slot*> mine_{nullptr};
};

// Never destroyed: other threads may still release memory while the process exits.
std::mutex g_mutex;
Mapping* g_mapping = nullptr;

Mapping& mapping() {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_mapping || !g_mapping->ours()) {  // a forked child has a slot of its own
    bool first = !g_mapping;
    g_mapping = new Mapping;
    if (first) atexit(softnpu_leave_node);
  }
  return *g_mapping;
}

template <class Field>
uint64_t sum(Field field) {
  uint64_t total = 0;
  for (auto& slot : mapping().table().slots)
    if (slot.pid > 0 && field(slot) && alive(slot)) total += static_cast<uint64_t>(field(slot));
  return total;
}

}  // namespace

namespace table {

size_t used_memory(int physical) {
  return sum([=](Slot& slot) { return slot.bytes[physical].load(); });
}

bool charge_memory(int physical, size_t bytes) {
  auto& mine = mapping().mine().bytes[physical];
  mine += bytes;
  if (used_memory(physical) <= device_memory()) return true;
  mine -= bytes;
  return false;
}

void release_memory(int physical, size_t bytes) { mapping().mine().bytes[physical] -= bytes; }

int used_streams(int physical) {
  return static_cast<int>(sum([=](Slot& slot) { return slot.streams[physical].load(); }));
}

bool take_streams(int physical, int count) {
  auto& mine = mapping().mine().streams[physical];
  mine += count;
  if (used_streams(physical) <= stream_budget()) return true;
  mine -= count;
  return false;
}

void return_streams(int physical, int count) { mapping().mine().streams[physical] -= count; }
void opened(int physical) { mapping().mine().open_devices |= 1ull << physical; }
void closed(int physical) { mapping().mine().open_devices &= ~(1ull << physical); }
void communicators(int delta) { mapping().mine().communicators += delta; }

}  // namespace table

void count_communicators(int delta) { table::communicators(delta); }

}  // namespace softnpu

// Releases what this process holds of the node, at exit. Also called by children of Python's multiprocessing, which exit
// without C's exit functions. Harmless when called twice, or by a process that never used a device.
extern "C" void softnpu_leave_node() {
  using namespace softnpu;
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_mapping && g_mapping->ours()) g_mapping->leave();
}

// The table as lines "pid communicators device bytes streams", one for each open device of each live process.
// Reads only: it creates neither a slot nor the file. Returns the length of the whole text.
extern "C" size_t softnpu_node_table(char* out, size_t size) {
  using namespace softnpu;
  std::string text;
  int fd = open(table_path().c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  if (fd >= 0 && fstat(fd, &info) == 0 && static_cast<size_t>(info.st_size) == sizeof(Table)) {
    void* address = mmap(nullptr, sizeof(Table), PROT_READ, MAP_SHARED, fd, 0);
    if (address != MAP_FAILED) {
      for (auto& slot : static_cast<Table*>(address)->slots) {
        if (!alive(slot)) continue;
        for (int device = 0; device < kMaxDevices; device++)
          if (slot.open_devices >> device & 1) {
            char line[160];
            snprintf(line, sizeof line, "%d %d %d %llu %d\n", slot.pid.load(), slot.communicators.load(), device,
                     static_cast<unsigned long long>(slot.bytes[device].load()), slot.streams[device].load());
            text += line;
          }
      }
      munmap(address, sizeof(Table));
    }
  }
  if (fd >= 0) close(fd);
  if (size) snprintf(out, size, "%s", text.c_str());
  return text.size();
}
