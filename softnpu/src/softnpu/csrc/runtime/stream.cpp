// Streams: in-order queues, each with a thread of its own, so that work is really asynchronous.
#include <algorithm>
#include <utility>

#include "runtime/core.h"

namespace softnpu {
namespace {

thread_local const Stream* t_running = nullptr;
// Never destroyed: stream threads outlive main().
auto& g_list_mutex = *new std::mutex;
auto& g_list = *new std::vector<std::weak_ptr<Stream>>;
auto& g_defaults = *new std::map<int, std::shared_ptr<Stream>>;

std::shared_ptr<Stream> make_stream(int visible) {
  static std::atomic<int> ids{0};
  auto stream = std::make_shared<Stream>(ids++, visible);
  std::lock_guard<std::mutex> lock(g_list_mutex);
  g_list.erase(std::remove_if(g_list.begin(), g_list.end(), [](auto& weak) { return weak.expired(); }), g_list.end());
  g_list.push_back(stream);
  return stream;
}

aclError create(aclrtStream* out) {
  int visible = visible_device();
  if (!out) return fail(ACL_ERROR_RT_PARAM_INVALID, "the stream's address is null");
  if (visible < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "a stream needs a device: call aclrtSetDevice first");
  if (!table::take_streams(physical_device(), 1))
    return fail(ACL_ERROR_RT_NO_STREAM_RESOURCE, "no stream left: all " + std::to_string(stream_budget()) +
                                                     " of NPU " + std::to_string(physical_device()) + " are in use (SOFTNPU_STREAMS)");
  *out = streams().add(make_stream(visible));
  return ACL_SUCCESS;
}

aclError destroy(aclrtStream handle, bool drop_queue) {
  auto stream = streams().remove(handle);
  if (!stream) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "aclrtDestroyStream of an unknown stream");
  stream->close(drop_queue);
  table::return_streams(visible_list()[stream->visible], 1);
  return ACL_SUCCESS;
}

aclError synchronize(aclrtStream handle, int limit_ms) {
  auto stream = resolve(handle);
  if (!stream) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "synchronisation of an unknown stream");
  std::shared_ptr<Graph> graph;
  {
    std::lock_guard<std::mutex> lock(capture_mutex());
    graph = stream->graph;
  }
  if (!graph) return stream->synchronize(limit_ms);
  invalidate(*graph);
  return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a stream under capture cannot be synchronised");
}

aclError set_failure_mode(aclrtStream handle, uint64_t mode) {
  auto stream = handle ? streams().find(handle) : nullptr;
  if (!stream) return fail(ACL_ERROR_RT_PARAM_INVALID, "the failure mode of an unknown stream");
  return stream->set_failure_mode(mode & 1);
}

aclError synchronize_device(int limit_ms) {
  int visible = visible_device();
  if (visible < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device set on this thread");
  if (auto code = forbid_in_capture("aclrtSynchronizeDevice")) return code;
  aclError first = ACL_SUCCESS;
  for (auto& stream : open_streams_of(visible))
    if (aclError code = stream->synchronize(limit_ms); code && !first) first = code;
  return first;
}

}  // namespace

Registry<Stream>& streams() {
  static auto* registry = new Registry<Stream>;
  return *registry;
}

std::shared_ptr<Stream> resolve(aclrtStream handle) {
  if (handle) return streams().find(handle);
  int visible = visible_device();
  if (visible < 0) return nullptr;
  {
    std::lock_guard<std::mutex> lock(g_list_mutex);
    if (auto found = g_defaults.find(visible); found != g_defaults.end()) return found->second;
  }
  auto stream = make_stream(visible);
  stream->is_default = true;
  std::lock_guard<std::mutex> lock(g_list_mutex);
  return g_defaults.emplace(visible, stream).first->second;
}

aclError check_context(const Stream& stream, const std::string& call) {
  if (stream.visible == visible_device() || !strict("stream-context")) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_STREAM_CONTEXT, call + " on a stream of device " + std::to_string(stream.visible) + " by a thread of device " +
                                               std::to_string(visible_device()) + ": call aclrtSetDevice first");
}

std::vector<std::shared_ptr<Stream>> streams_of(int visible) {
  std::vector<std::shared_ptr<Stream>> found;
  std::lock_guard<std::mutex> lock(g_list_mutex);
  for (auto& weak : g_list)
    if (auto stream = weak.lock(); stream && stream->visible == visible) found.push_back(stream);
  return found;
}

std::vector<std::shared_ptr<Stream>> open_streams_of(int visible) {
  auto found = streams_of(visible);
  found.erase(std::remove_if(found.begin(), found.end(), [](auto& stream) { return stream->closed(); }), found.end());
  return found;
}

void close_streams(int visible) {
  auto owned = streams().remove_if([=](const Stream& stream) { return stream.visible == visible; });
  {
    std::lock_guard<std::mutex> lock(g_list_mutex);
    if (auto found = g_defaults.extract(visible)) found.mapped()->close(false);
  }
  for (auto& stream : owned) stream->close(false);
  table::return_streams(visible_list()[visible], static_cast<int>(owned.size()));
}

void Stream::push(Work work) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(work));
  if (!started_) {
    started_ = true;
    std::thread([self = shared_from_this()] {
      slow_release_thread_polling();
      self->loop();
    }).detach();
  } else if (!busy_) {
    arrived_.notify_one();
  }
}

void Stream::loop() {
  t_running = this;
  use_device(visible);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (queue_.empty() && !closing_) {
      busy_ = false;
      drained_.notify_all();
      arrived_.wait(lock);
    }
    if (queue_.empty()) break;
    Work work = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    run(work);
    work = {};  // release what the task owns before the stream can report idle
    lock.lock();
  }
  busy_ = false;
  drained_.notify_all();
}

void Stream::run(Work& work) {
  if (context(visible).stopped()) return;
  log(3, "stream %d: %s", id, work.name.c_str());
  aclError code = ACL_SUCCESS;
  try {
    if (fault("device_error", {{"device", std::to_string(visible_list()[visible])}, {"task", work.name}}))
      code = fail(ACL_ERROR_RT_AICORE_EXCEPTION, "a device error, injected by SOFTNPU_FAULTS");
    else
      code = work.body();
  } catch (const std::exception& error) {
    code = fail(ACL_ERROR_RT_AICORE_EXCEPTION, error.what());
  }
  if (code) failed(code, work.name + ": " + last_error());
}

void Stream::failed(aclError code, const std::string& text) {
  if (context(visible).stop_on_failure) return context(visible).stop(code, text);
  log(1, "stream %d continues after: %s (%d)", id, text.c_str(), static_cast<int>(code));
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_) return;
  error_text_ = text;
  error_ = code;
}

// As CANN's runtime: set once, and then for all streams of the context.
aclError Stream::set_failure_mode(bool stop) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stop_on_failure_ && !stop) return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a stream that stops on failure cannot be set to continue");
  stop_on_failure_ = stop;
  if (stop && strict("context-stop")) context(visible).stop_on_failure = true;
  return ACL_SUCCESS;
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !busy_;
}

bool Stream::wait_for(Limit limit, const std::function<bool()>& ready) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (limit) return drained_.wait_for(lock, *limit, ready);
  drained_.wait(lock, ready);
  return true;
}

bool Stream::wait_idle(Limit limit) {
  return wait_for(limit, [this] { return queue_.empty() && !busy_; });
}

aclError Stream::synchronize(int limit_ms) {
  Context& owner = context(visible);
  Limit limit = limit_ms < 0 ? Limit() : Limit(std::chrono::milliseconds(limit_ms));
  if (!wait_for(limit, [&] { return owner.stopped() || (queue_.empty() && !busy_); }))
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream " + std::to_string(id) + " did not finish in " + std::to_string(limit_ms) + " ms");
  if (auto code = owner.failure()) return code;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) return ACL_SUCCESS;
  return fail(std::exchange(error_, ACL_SUCCESS), error_text_);  // reported once, as CANN does
}

void Stream::wake() {
  std::lock_guard<std::mutex> lock(mutex_);
  drained_.notify_all();
}

void Stream::clear_error() {
  std::lock_guard<std::mutex> lock(mutex_);
  error_ = ACL_SUCCESS;
}

void Stream::close(bool drop_queue) {
  if (!drop_queue) synchronize(-1);
  std::lock_guard<std::mutex> lock(mutex_);
  if (drop_queue) queue_.clear();
  closing_ = true;
  arrived_.notify_all();
}

bool Stream::closed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return closing_;
}

bool Stream::runs_here() const { return t_running == this; }

aclError enqueue(aclrtStream handle, std::string name, Task task) {
  auto stream = resolve(handle);
  if (!stream) return fail(ACL_ERROR_RT_STREAM_CONTEXT, name + " on an unknown stream");
  if (auto code = check_context(*stream, name)) return code;
  return enqueue(stream, {std::move(name), std::move(task)});
}

}  // namespace softnpu

using namespace softnpu;

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) { return create(stream); }
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return create(stream); }
aclError aclrtDestroyStream(aclrtStream stream) { return destroy(stream, false); }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return destroy(stream, true); }
aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronize(stream, -1); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t ms) { return synchronize(stream, ms); }
aclError aclrtSynchronizeDevice() { return synchronize_device(-1); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return synchronize_device(ms); }

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  auto stream = resolve(handle);
  if (!stream || !status) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtStreamQuery of an unknown stream");
  if (auto code = context(stream->visible).failure()) return code;
  *status = stream->idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamAvailableNum(uint32_t* count) {
  int physical = physical_device();
  if (physical < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetStreamAvailableNum needs a device: call aclrtSetDevice first");
  *count = static_cast<uint32_t>(std::max(0, stream_budget() - table::used_streams(physical)));
  return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  auto stream = resolve(handle);
  if (!stream || !id) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtStreamGetId of an unknown stream");
  *id = stream->id;
  return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return set_failure_mode(stream, mode); }
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute, aclrtStreamAttrValue* value) {
  return attribute == ACL_STREAM_ATTR_FAILURE_MODE ? set_failure_mode(stream, value->failureMode) : ACL_SUCCESS;
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream handle, uint32_t flag) {
  auto stream = resolve(handle);
  if (!stream) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtSetStreamOverflowSwitch of an unknown stream");
  stream->overflow_switch = flag;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream handle, uint32_t* flag) {
  auto stream = resolve(handle);
  if (!stream || !flag) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtGetStreamOverflowSwitch of an unknown stream");
  *flag = stream->overflow_switch;
  return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType, aclrtStream stream) {
  return enqueue(stream, "callback", [=] { function(data); return ACL_SUCCESS; });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* data) {
  return enqueue(stream, "host function", [=] { function(data); return ACL_SUCCESS; });
}

// Callbacks run on the stream's thread here, so the thread that would report them only has to wait.
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t ms) {
  std::this_thread::sleep_for(std::chrono::milliseconds(ms > 0 ? std::min(ms, 1000) : 100));
  return ACL_ERROR_RT_THREAD_SUBSCRIBE;
}

}  // extern "C"
