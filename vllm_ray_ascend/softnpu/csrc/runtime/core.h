// The objects of the runtime: devices, streams, events, graphs. Handles that the C ABI gives out are plain
// pointers to them; a Registry keeps each alive until it is destroyed, and queued work beyond that.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "softnpu.h"

namespace softnpu {

using Clock = std::chrono::steady_clock;

// Shared ownership behind raw handles: destroying a handle drops one owner, queued tasks may hold others.
template <class T>
class Registry {
 public:
  T* add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    T* handle = object.get();
    objects_[handle] = std::move(object);
    return handle;
  }
  std::shared_ptr<T> find(void* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = objects_.find(static_cast<T*>(handle));
    return found == objects_.end() ? nullptr : found->second;
  }
  std::shared_ptr<T> remove(void* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = objects_.find(static_cast<T*>(handle));
    if (found == objects_.end()) return nullptr;
    auto object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<T*, std::shared_ptr<T>> objects_;
};

// ---- settings.cpp
int device_count();                       // physical devices of this node
const std::vector<int>& visible_list();   // physical id of each visible device, as CANN reads the variable
size_t device_memory();                   // bytes of one device
int stream_budget();                      // hardware streams of one device
std::chrono::milliseconds wait_limit();   // longest wait of a stream for an event or a value
void set_op_wait_timeout(uint32_t seconds);

// ---- node_table.cpp: what all processes of the node hold, in shared memory
constexpr int kMaxDevices = 64;
namespace table {
bool charge_memory(int physical, size_t bytes);  // false: the device is full
void release_memory(int physical, size_t bytes);
size_t used_memory(int physical);
bool take_streams(int physical, int count);      // false: the budget is exhausted
void return_streams(int physical, int count);
int used_streams(int physical);
void opened(int physical);
void closed(int physical);
void communicators(int delta);
}  // namespace table

// ---- streams
struct Graph;
struct TaskGroup;

// Runs `body` even after the stream failed, if `always`: an event must fire, or its waiters hang.
struct Work {
  std::string name;
  Task body;
  bool always = false;
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int id, int visible) : id(id), visible(visible) {}
  void push(Work work);
  bool idle();
  // Waits until all that was pushed has run; the stream's sticky error, or a timeout (limit_ms < 0: none).
  aclError synchronize(int limit_ms);
  void close(bool drop_queue);
  bool closed();
  bool runs_here() const;  // is the calling thread this stream's own

  const int id;
  const int visible;
  std::atomic<uint32_t> overflow_switch{0};

  // Capture state, guarded by capture_mutex().
  std::shared_ptr<Graph> graph;
  std::shared_ptr<TaskGroup> updating;
  std::vector<Work> update;

 private:
  void loop();
  void run(Work& work);

  std::mutex mutex_;
  std::condition_variable arrived_, drained_;
  std::deque<Work> queue_;
  bool busy_ = false, started_ = false, closing_ = false;
  std::atomic<aclError> error_{ACL_SUCCESS};
  std::string error_text_;
};

Registry<Stream>& streams();
std::shared_ptr<Stream> resolve(aclrtStream handle);  // null: the default stream of the thread's device
std::vector<std::shared_ptr<Stream>> streams_of(int visible);  // also closed ones whose last task still runs
std::vector<std::shared_ptr<Stream>> open_streams_of(int visible);
aclError enqueue(const std::shared_ptr<Stream>& stream, Work work);
void use_device(int visible);  // for the calling thread
void calm_release_thread();    // of torch_npu, once it is there

// ---- graphs
struct TaskGroup : std::enable_shared_from_this<TaskGroup> {
  std::mutex mutex;
  std::vector<Work> works;
};

struct Node {
  Work work;
  std::shared_ptr<TaskGroup> group;  // set: the node is the group, and `work` is empty
};

// How far each captured stream had got, seen from one point of the capture.
using Frontier = std::map<const Stream*, size_t>;

struct Graph : std::enable_shared_from_this<Graph> {
  ~Graph();
  enum class State { kCapturing, kInvalidated, kReady };
  uint32_t id = 0;
  int physical = -1;
  State state = State::kCapturing;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;
  const Stream* origin = nullptr;
  std::vector<Node> nodes;
  std::shared_ptr<TaskGroup> open_group;
  std::set<std::shared_ptr<Stream>> streams;
  std::map<const Stream*, Frontier> frontiers;
  std::set<const void*> occupants;
  int budget_taken = 0;
};

std::mutex& capture_mutex();
aclError record(Graph& graph, const Stream& stream, Work work);            // capture_mutex held
aclError join_capture(const std::shared_ptr<Graph>&, const std::shared_ptr<Stream>&);  // capture_mutex held
aclError occupy(Graph& graph, const void* owner);                          // capture_mutex held
void invalidate(Graph& graph);
bool capture_in_progress();                                                // of any stream of this process

// ---- events
// One recording of an event; waiters hold it, so recording anew does not disturb them.
struct Recording {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Clock::time_point time;
  bool captured = false;  // recorded inside a capture: an edge, and no time
  std::weak_ptr<Graph> graph;  // of that capture. Weak, so that a kept event does not keep the streams of a dropped graph
  Frontier frontier;

  void fire();
  bool wait(std::chrono::milliseconds limit);
};

}  // namespace softnpu
