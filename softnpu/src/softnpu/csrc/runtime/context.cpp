// Contexts: what one process has of a device. Counts who uses it, and stops all of it when a task fails.
#include "runtime/memory.h"

namespace softnpu {
namespace {

// The device of a thread that set none (aclInit's "defaultDevice"), or -1.
std::atomic<int> g_default{-1};
thread_local int t_visible = -1;

}  // namespace

Context& context(int visible) {
  static auto* contexts = [] {
    auto* made = new std::vector<std::unique_ptr<Context>>;
    for (int index = 0; index < kMaxDevices; index++) made->push_back(std::make_unique<Context>(index));
    return made;
  }();
  return *(*contexts)[visible];
}

void Context::retain() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (users_++ == 0) table::opened(visible_list()[visible]);
}

bool Context::open() {
  std::lock_guard<std::mutex> lock(mutex_);
  return users_ > 0;
}

aclError Context::release(bool force) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (users_ == 0) return fail(ACL_ERROR_RT_CONTEXT_RELEASE_ERROR, "device " + std::to_string(visible) + " is reset more often than it was set");
    if (!force && users_ > 1) {
      users_--;
      return ACL_SUCCESS;
    }
  }
  close_streams(visible);
  forget_events(visible);
  free_memory(visible);
  resume();
  stop_on_failure = false;
  std::lock_guard<std::mutex> lock(mutex_);
  users_ = 0;
  table::closed(visible_list()[visible]);
  return ACL_SUCCESS;
}

bool Context::stopped() const { return error_ != ACL_SUCCESS; }

aclError Context::failure() {
  if (!stopped()) return ACL_SUCCESS;
  std::lock_guard<std::mutex> lock(mutex_);
  return error_ ? fail(error_, "the context of device " + std::to_string(visible) + " has stopped: " + text_) : ACL_SUCCESS;
}

void Context::stop(aclError code, const std::string& text) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_) return;  // the first error is the cause
    text_ = text;
    error_ = code;
  }
  log(1, "the context of device %d stops: %s (%d)", visible, text.c_str(), static_cast<int>(code));
  wake_event_waits();
  for (auto& stream : streams_of(visible)) stream->wake();
}

void Context::resume() {
  for (auto& stream : streams_of(visible)) stream->clear_error();
  std::lock_guard<std::mutex> lock(mutex_);
  error_ = ACL_SUCCESS;
}

aclError Context::abort_tasks(Limit limit) {
  stop(ACL_ERROR_RT_DEVICE_TASK_ABORT, "aclrtDeviceTaskAbort");
  auto start = Clock::now();
  for (auto& stream : streams_of(visible)) {
    Limit rest = limit;
    if (limit) rest = std::max(Clock::duration::zero(), *limit - (Clock::now() - start));
    if (!stream->wait_idle(rest)) return fail(ACL_ERROR_RT_WAIT_TIMEOUT, "a task of stream " + std::to_string(stream->id) + " does not end");
  }
  resume();
  return ACL_SUCCESS;
}

int thread_device() { return t_visible; }
void use_device(int visible) { t_visible = visible; }
int default_device() { return g_default; }
void set_default_device(int visible) { g_default = visible; }

int visible_device() {
  if (t_visible >= 0) return context(t_visible).open() ? t_visible : -1;
  int visible = g_default;
  return visible >= 0 && set_device(visible) == ACL_SUCCESS ? visible : -1;
}

int physical_device() {
  int visible = visible_device();
  return visible < 0 ? -1 : visible_list()[visible];
}

bool device_stopped() { return t_visible >= 0 && context(t_visible).stopped(); }

}  // namespace softnpu
