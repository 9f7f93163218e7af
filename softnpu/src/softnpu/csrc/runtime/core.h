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
#include <optional>
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
  std::vector<std::shared_ptr<T>> remove_if(const std::function<bool(const T&)>& chosen) {
    std::vector<std::shared_ptr<T>> removed;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto next = objects_.begin(); next != objects_.end();) {
      auto current = next++;
      if (!chosen(*current->second)) continue;
      removed.push_back(std::move(current->second));
      objects_.erase(current);
    }
    return removed;
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
const std::vector<int>& visible_list();   // physical id of each visible device, as CANN parses the variable
size_t device_memory();                   // bytes of one device
int stream_budget();                      // hardware streams of one device
using Limit = std::optional<Clock::duration>;  // of a wait; none: it may take for ever
Limit wait_limit();                       // SOFTNPU_WAIT_LIMIT, which no wait exceeds
Limit op_wait_limit();                    // of a stream that waits for an event: also aclrtSetOpWaitTimeout
void set_op_wait_timeout(uint32_t seconds);
aclError check_settings();                // an error, also printed, where SOFTNPU_STRICT or _FAULTS name what there is not

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

// ---- context.cpp: what one process has of a device
class Context {
 public:
  explicit Context(int visible) : visible(visible) {}
  void retain();                  // one more user (aclrtSetDevice)
  aclError release(bool force);   // one user less, or none; the last frees memory, streams and events of the device
  bool open();                    // has it a user
  // Once a task has failed in a context that stops on failure: no task runs, none is taken, and whoever waits gets the error.
  void stop(aclError code, const std::string& text);
  bool stopped() const;
  aclError failure();             // the error that stopped it, as fail() reports it; ACL_SUCCESS while it works
  aclError abort_tasks(Limit limit);  // ends all tasks; after that the context works again (aclrtDeviceTaskAbort)

  const int visible;
  std::atomic<bool> stop_on_failure{false};  // as soon as one stream was set so (aclrtSetStreamFailureMode)

 private:
  void resume();

  std::mutex mutex_;
  int users_ = 0;
  std::atomic<aclError> error_{ACL_SUCCESS};
  std::string text_;
};

Context& context(int visible);
aclError set_device(int visible);  // for the calling thread, as aclrtSetDevice
int thread_device();               // that the calling thread has set, or -1: does not open the default device
void use_device(int visible);      // for the calling thread, which works for a user of the device
int default_device();              // of aclInit's configuration, or -1
void set_default_device(int visible);
void close_streams(int visible);   // stream.cpp
void forget_events(int visible);   // event.cpp
void wake_event_waits();           // of threads whose context has stopped
void free_memory(int visible);     // memory.cpp

// ---- streams
struct Graph;
struct TaskGroup;

struct Work {
  std::string name;
  Task body;
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int id, int visible) : id(id), visible(visible) {}
  void push(Work work);
  bool idle();
  // Waits until all pushed work has run or the context stops. Returns the context's error; else the first one of a task
  // since the last call; or a timeout (limit_ms < 0: none).
  aclError synchronize(int limit_ms);
  bool wait_idle(Limit limit);     // until no task runs, also in a context that has stopped; false: not in time
  void wake();                     // the context has stopped
  void clear_error();
  aclError set_failure_mode(bool stop);
  void close(bool drop_queue);
  bool closed();
  bool runs_here() const;  // is the calling thread this stream's own

  const int id;
  const int visible;
  std::atomic<bool> is_default{false};  // the device's own, which the handle NULL names
  std::atomic<uint32_t> overflow_switch{0};

  // Capture state, guarded by capture_mutex().
  std::shared_ptr<Graph> graph;
  std::shared_ptr<TaskGroup> updating;
  std::vector<Work> update;

 private:
  void loop();
  void run(Work& work);
  void failed(aclError code, const std::string& text);
  bool wait_for(Limit limit, const std::function<bool()>& ready);

  std::mutex mutex_;
  std::condition_variable arrived_, drained_;
  std::deque<Work> queue_;
  bool busy_ = false, started_ = false, closing_ = false;
  bool stop_on_failure_ = false;
  aclError error_ = ACL_SUCCESS;  // of a task, in a context that continues
  std::string error_text_;
};

Registry<Stream>& streams();
std::shared_ptr<Stream> resolve(aclrtStream handle);  // null: the default stream of the thread's device
aclError check_context(const Stream& stream, const std::string& call);  // an error where it is not of the thread's device
std::vector<std::shared_ptr<Stream>> streams_of(int visible);  // also closed ones whose last task still runs
std::vector<std::shared_ptr<Stream>> open_streams_of(int visible);
aclError enqueue(const std::shared_ptr<Stream>& stream, Work work);
void slow_release_thread_polling();  // of torch_npu, once it exists

// ---- graphs
struct TaskGroup : std::enable_shared_from_this<TaskGroup> {
  std::mutex mutex;
  std::vector<Work> works;
};

struct Node {
  Work work;
  std::shared_ptr<TaskGroup> group;  // set: the node is the group, and `work` is empty
};

// The progress of each captured stream, as known at one point of the capture.
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
// One recording of an event; waiters hold it, so recording again does not affect them.
struct Recording {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Clock::time_point time;
  bool captured = false;  // recorded inside a capture: an edge without a time
  std::weak_ptr<Graph> graph;  // of that capture. Weak, so that a kept event does not keep the streams of a dropped graph
  Frontier frontier;

  void fire();
  bool wait(Limit limit, const Context& waiter);  // true: it has happened; false: not in time, or the waiter's context stopped
};

}  // namespace softnpu
