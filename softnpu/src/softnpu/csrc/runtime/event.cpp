// Events: points in streams that other streams and the host wait for.
#include <algorithm>

#include "runtime/core.h"

namespace softnpu {

namespace {

// The recordings that threads wait for now.
auto& g_waited_mutex = *new std::mutex;
auto& g_waited = *new std::multiset<Recording*>;

class Waited {
 public:
  explicit Waited(Recording* recording) {
    std::lock_guard<std::mutex> lock(g_waited_mutex);
    place_ = g_waited.insert(recording);
  }
  ~Waited() {
    std::lock_guard<std::mutex> lock(g_waited_mutex);
    g_waited.erase(place_);
  }

 private:
  std::multiset<Recording*>::iterator place_;
};

}  // namespace

void wake_event_waits() {
  std::lock_guard<std::mutex> lock(g_waited_mutex);
  for (auto* recording : g_waited) {
    std::lock_guard<std::mutex> inner(recording->mutex);
    recording->changed.notify_all();
  }
}

void Recording::fire() {
  std::lock_guard<std::mutex> lock(mutex);
  time = Clock::now();
  done = true;
  changed.notify_all();
}

bool Recording::wait(Limit limit, const Context& waiter) {
  Waited waited(this);
  std::unique_lock<std::mutex> lock(mutex);
  auto ready = [&] { return done || waiter.stopped(); };
  if (limit)
    changed.wait_for(lock, *limit, ready);
  else
    changed.wait(lock, ready);
  return done && !waiter.stopped();
}

namespace {

struct Event {
  int visible = 0;  // of the context that it was created in
  uint32_t flag = 0;
  std::mutex mutex;
  std::shared_ptr<Recording> current;

  bool external() const { return flag & ACL_EVENT_EXTERNAL; }

  void renew(std::shared_ptr<Recording> recording) {
    std::lock_guard<std::mutex> lock(mutex);
    current = std::move(recording);
  }

  // An event that was never recorded counts as past, but an external one is waited for until it is recorded.
  std::shared_ptr<Recording> get() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!current) {
      current = std::make_shared<Recording>();
      current->done = !external();
    }
    return current;
  }
};

Registry<Event>& events() {
  static auto* registry = new Registry<Event>;
  return *registry;
}

aclError create(aclrtEvent* out, uint32_t flag) {
  if (!out) return fail(ACL_ERROR_RT_PARAM_INVALID, "the event's address is null");
  int visible = visible_device();
  if (visible < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "an event needs a device: call aclrtSetDevice first");
  auto event = std::make_shared<Event>();
  event->visible = visible;
  event->flag = flag;
  *out = events().add(event);
  return ACL_SUCCESS;
}

aclError wait_for(const std::shared_ptr<Recording>& recording, Limit limit, int visible) {
  Context& waiter = context(visible);
  if (recording->wait(limit, waiter)) return ACL_SUCCESS;
  if (auto code = waiter.failure()) return code;
  return fail(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "an event was not recorded within " +
                                                   std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(*limit).count()) +
                                                   " ms (aclrtSetOpWaitTimeout, SOFTNPU_WAIT_LIMIT)");
}

aclError wait_task(const std::shared_ptr<Recording>& recording) { return wait_for(recording, op_wait_limit(), visible_device()); }

aclError host_wait(const Event& event, const std::shared_ptr<Recording>& recording) { return wait_for(recording, wait_limit(), event.visible); }

aclError record_event(const std::shared_ptr<Stream>& stream, const std::shared_ptr<Event>& event) {
  if (event->external()) return enqueue(stream, {"record external event", [event] { event->get()->fire(); return ACL_SUCCESS; }});
  auto recording = std::make_shared<Recording>();
  {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (stream->graph && !stream->updating) {
      recording->captured = true;
      recording->graph = stream->graph;
      recording->frontier = stream->graph->frontiers[stream.get()];
    }
  }
  if (recording->captured) {
    event->renew(recording);
    return ACL_SUCCESS;
  }
  if (auto code = context(stream->visible).failure()) return code;
  event->renew(recording);
  return enqueue(stream, {"record event", [recording] { recording->fire(); return ACL_SUCCESS; }});
}

aclError wait_event(const std::shared_ptr<Stream>& stream, const std::shared_ptr<Event>& event) {
  if (event->external()) return enqueue(stream, {"wait for external event", [event] { return wait_task(event->get()); }});
  auto recording = event->get();
  if (recording->captured) {
    auto graph = recording->graph.lock();  // taken before the lock: dropping the last owner of a graph runs much code
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!graph || graph->state == Graph::State::kReady)
      return fail(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture that has ended");
    if (stream->is_default && strict("capture-null-stream"))
      return fail(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the NULL stream cannot wait for an event of a capture");
    if (stream->graph && stream->graph != graph)
      return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for an event of another capture");
    if (auto code = join_capture(graph, stream)) return code;
    auto& mine = graph->frontiers[stream.get()];
    for (auto& [other, position] : recording->frontier) mine[other] = std::max(mine[other], position);
    return ACL_SUCCESS;
  }
  {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (stream->graph && !stream->updating) return ACL_SUCCESS;  // recorded before the capture began: the replay follows it anyway
  }
  return enqueue(stream, {"wait for event", [recording] { return wait_task(recording); }});
}

}  // namespace

void forget_events(int visible) {
  events().remove_if([=](const Event& event) { return event.visible == visible; });
}

}  // namespace softnpu

using namespace softnpu;

// Defines `name` from `handle`, or returns the error of an unknown event.
#define EVENT_OR_RETURN(name, handle) \
  auto name = events().find(handle);  \
  if (!name) return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(__func__) + " of an unknown event")

extern "C" {

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) { return create(event, flag); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) { return create(event, flag); }

aclError aclrtDestroyEvent(aclrtEvent handle) {
  return events().remove(handle) ? ACL_SUCCESS : fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtDestroyEvent of an unknown event");
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  EVENT_OR_RETURN(event, handle);
  auto stream = resolve(stream_handle);
  if (!stream) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "aclrtRecordEvent on an unknown stream");
  if (auto code = check_context(*stream, "aclrtRecordEvent")) return code;
  return record_event(stream, event);
}

aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  EVENT_OR_RETURN(event, handle);
  auto stream = resolve(stream_handle);
  if (!stream) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "aclrtStreamWaitEvent on an unknown stream");
  if (auto code = check_context(*stream, "aclrtStreamWaitEvent")) return code;
  return wait_event(stream, event);
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
  EVENT_OR_RETURN(event, handle);
  if (!event->external()) return ACL_SUCCESS;  // recording such an event again resets it
  return enqueue(stream, "reset event", [event] { event->renew(std::make_shared<Recording>()); return ACL_SUCCESS; });
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  EVENT_OR_RETURN(event, handle);
  auto recording = event->get();
  if (!recording->captured) return host_wait(*event, recording);
  if (auto graph = recording->graph.lock()) invalidate(*graph);
  return fail(ACL_ERROR_RT_EVENT_CAPTURED, "an event of a capture cannot be synchronised");
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent handle, int32_t ms) {
  if (ms < 0) return aclrtSynchronizeEvent(handle);
  EVENT_OR_RETURN(event, handle);
  auto recording = event->get();
  if (recording->captured) return aclrtSynchronizeEvent(handle);
  Context& owner = context(event->visible);
  if (recording->wait(std::chrono::milliseconds(ms), owner)) return ACL_SUCCESS;
  // "Not yet" is a result, not a failure to log: a caller that polls gets it many times.
  return owner.stopped() ? owner.failure() : ACL_ERROR_RT_EVENT_SYNC_TIMEOUT;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  EVENT_OR_RETURN(event, handle);
  auto recording = event->get();
  if (recording->captured) return fail(ACL_ERROR_RT_EVENT_CAPTURED, "an event of a capture cannot be queried");
  std::lock_guard<std::mutex> lock(recording->mutex);
  *status = recording->done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return context(event->visible).failure();
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  EVENT_OR_RETURN(event, handle);
  auto recording = event->get();
  std::lock_guard<std::mutex> lock(recording->mutex);
  *status = recording->done ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return context(event->visible).failure();
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent start_handle, aclrtEvent end_handle) {
  EVENT_OR_RETURN(start, start_handle);
  EVENT_OR_RETURN(end, end_handle);
  auto from = start->get(), to = end->get();
  if (from->captured || to->captured) return fail(ACL_ERROR_RT_EVENT_CAPTURED, "events of a capture have no time");
  if (auto code = host_wait(*start, from)) return code;
  if (auto code = host_wait(*end, to)) return code;
  *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* microseconds) {
  EVENT_OR_RETURN(event, handle);
  auto recording = event->get();
  if (auto code = host_wait(*event, recording)) return code;
  *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(recording->time.time_since_epoch()).count();
  return ACL_SUCCESS;
}

}  // extern "C"
