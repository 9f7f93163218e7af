// ACL graphs: tasks of a capturing stream are recorded instead of run, and a replay runs them in recorded order.
//
// The capture rules are CANN's: a call that would have to wait, allocate or copy immediately is rejected while a capture is
// in progress that covers the calling thread, and invalidates that capture; streams that an event adds to a capture must be
// joined back; each captured stream and each communicator used costs one hardware stream for as long as the graph lives.
#include <algorithm>

#include "runtime/core.h"

namespace softnpu {
namespace {

thread_local aclmdlRICaptureMode t_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

Registry<Graph>& graphs() {
  static auto* registry = new Registry<Graph>;
  return *registry;
}

// The captures in progress of this process; guarded by capture_mutex().
std::set<Graph*>& active() {
  static auto* set = new std::set<Graph*>;
  return *set;
}

bool covers(const Graph& graph, std::thread::id thread) {
  switch (graph.mode) {
    case ACL_MODEL_RI_CAPTURE_MODE_GLOBAL: return true;
    case ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL: return graph.thread == thread;
    default: return false;
  }
}

aclError run_node(const Node& node) {
  if (!node.group) return node.work.body();
  std::vector<Work> works;
  {
    std::lock_guard<std::mutex> lock(node.group->mutex);
    works = node.group->works;
  }
  for (auto& work : works)
    if (auto code = work.body()) return fail(code, work.name + ": " + last_error());
  return ACL_SUCCESS;
}

aclError replay(const Graph& graph) {
  Context& owner = context(visible_device());
  aclError first = ACL_SUCCESS;
  std::string text;
  for (auto& node : graph.nodes) {
    if (owner.stopped() || (first && owner.stop_on_failure)) break;
    if (aclError code = run_node(node); code && !first) {
      first = code;
      text = node.work.name + ": " + last_error();
    }
  }
  return first ? fail(first, "graph " + std::to_string(graph.id) + ", " + text) : ACL_SUCCESS;
}

bool joined(const Graph& graph) {
  const Frontier& end = graph.frontiers.at(graph.origin);
  for (auto& [stream, frontier] : graph.frontiers) {
    auto own = frontier.find(stream);
    if (own == frontier.end()) continue;
    auto seen = end.find(stream);
    if (seen == end.end() || seen->second < own->second) return false;
  }
  return true;
}

aclError begin(const std::shared_ptr<Stream>& stream, aclmdlRICaptureMode mode) {
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (stream->graph) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is under capture already");
  static uint32_t ids = 0;
  auto graph = std::make_shared<Graph>();
  graph->id = ++ids;
  graph->physical = visible_list()[stream->visible];
  graph->mode = mode;
  graph->thread = std::this_thread::get_id();
  graph->origin = stream.get();
  if (auto code = join_capture(graph, stream)) {
    stream->graph = nullptr;
    return code;
  }
  active().insert(graph.get());
  return ACL_SUCCESS;
}

void leave_capture(Graph& graph) {
  active().erase(&graph);
  for (auto& stream : graph.streams) stream->graph = nullptr;
  graph.streams.clear();
}

aclError end(const std::shared_ptr<Stream>& stream, aclmdlRI* out) {
  std::shared_ptr<Graph> graph;  // outlives the lock: dropping a failed capture runs much code
  std::lock_guard<std::mutex> lock(capture_mutex());
  graph = stream->graph;
  if (!graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "aclmdlRICaptureEnd of a stream that is not under capture");
  if (graph->origin != stream.get()) return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "aclmdlRICaptureEnd on another stream than aclmdlRICaptureBegin");
  if (graph->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && graph->thread != std::this_thread::get_id())
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD, "aclmdlRICaptureEnd in another thread than aclmdlRICaptureBegin");
  leave_capture(*graph);
  *out = nullptr;
  if (graph->state == Graph::State::kInvalidated) return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture was invalidated by a forbidden call");
  graph->state = Graph::State::kReady;
  if (fault("capture", {{"device", std::to_string(graph->physical)}})) return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "capture failure injected by SOFTNPU_FAULTS");
  if (!joined(*graph)) return fail(ACL_ERROR_RT_STREAM_UNJOINED, "a stream that was added to the capture was not joined back to the stream it began on");
  *out = graphs().add(graph);
  return ACL_SUCCESS;
}

aclError enqueue_capturing(Stream& stream, Work& work, bool* taken) {
  std::lock_guard<std::mutex> lock(capture_mutex());
  *taken = stream.updating || stream.graph;
  if (stream.updating) {
    stream.update.push_back(std::move(work));
    return ACL_SUCCESS;
  }
  return stream.graph ? record(*stream.graph, stream, std::move(work)) : ACL_SUCCESS;
}

}  // namespace

Graph::~Graph() { table::return_streams(physical, budget_taken); }

std::mutex& capture_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

aclError enqueue(const std::shared_ptr<Stream>& stream, Work work) {
  if (auto code = context(stream->visible).failure()) return code;
  bool taken = false;
  if (auto code = enqueue_capturing(*stream, work, &taken); code || taken) return code;
  stream->push(std::move(work));
  return ACL_SUCCESS;
}

aclError record(Graph& graph, const Stream& stream, Work work) {
  if (graph.state == Graph::State::kInvalidated) return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, work.name + ": the capture is invalidated");
  if (graph.open_group) {
    std::lock_guard<std::mutex> lock(graph.open_group->mutex);
    graph.open_group->works.push_back(std::move(work));
  } else {
    graph.nodes.push_back({std::move(work), nullptr});
  }
  graph.frontiers[&stream][&stream] = graph.nodes.size();
  return ACL_SUCCESS;
}

aclError occupy(Graph& graph, const void* owner) {
  if (!graph.occupants.insert(owner).second) return ACL_SUCCESS;
  if (!table::take_streams(graph.physical, 1)) {
    graph.state = Graph::State::kInvalidated;
    return fail(ACL_ERROR_RT_NO_STREAM_RESOURCE, "stream resources insufficient for the capture: all " + std::to_string(stream_budget()) +
                                                     " of NPU " + std::to_string(graph.physical) + " are in use (SOFTNPU_STREAMS)");
  }
  graph.budget_taken++;
  return ACL_SUCCESS;
}

aclError join_capture(const std::shared_ptr<Graph>& graph, const std::shared_ptr<Stream>& stream) {
  if (stream->graph == graph) return ACL_SUCCESS;
  if (auto code = occupy(*graph, stream.get())) return code;
  stream->graph = graph;
  graph->streams.insert(stream);
  graph->frontiers[stream.get()];
  return ACL_SUCCESS;
}

void invalidate(Graph& graph) {
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (graph.state == Graph::State::kCapturing) graph.state = Graph::State::kInvalidated;
}

bool capture_in_progress() {
  std::lock_guard<std::mutex> lock(capture_mutex());
  return !active().empty();
}

bool capturing(aclrtStream handle) {
  auto stream = resolve(handle);
  if (!stream) return false;
  std::lock_guard<std::mutex> lock(capture_mutex());
  return stream->graph || stream->updating;
}

aclError forbid_in_capture(const char* call) {
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (t_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  bool forbidden = false;
  for (auto* graph : active())
    if (covers(*graph, std::this_thread::get_id())) {
      forbidden = true;
      graph->state = Graph::State::kInvalidated;
    }
  return forbidden ? fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, std::string(call) + " is not allowed while a graph is captured") : ACL_SUCCESS;
}

aclError reserve_graph_stream(aclrtStream handle, const void* owner) {
  auto stream = resolve(handle);
  std::lock_guard<std::mutex> lock(capture_mutex());
  return stream && stream->graph ? occupy(*stream->graph, owner) : ACL_SUCCESS;
}

}  // namespace softnpu

using namespace softnpu;

#define STREAM_OR_RETURN(name, handle) \
  auto name = resolve(handle);         \
  if (!name) return fail(ACL_ERROR_RT_STREAM_CONTEXT, std::string(__func__) + " on an unknown stream")
#define GRAPH_OR_RETURN(name, handle)  \
  auto name = graphs().find(handle);   \
  if (!name) return fail(ACL_ERROR_RT_MODEL_CONTEXT, std::string(__func__) + " of an unknown graph")

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  if (!handle && strict("capture-null-stream")) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclmdlRICaptureBegin of the NULL stream");
  STREAM_OR_RETURN(stream, handle);
  if (auto code = check_context(*stream, "aclmdlRICaptureBegin")) return code;
  if (mode < ACL_MODEL_RI_CAPTURE_MODE_GLOBAL || mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclmdlRICaptureBegin: there is no mode " + std::to_string(mode));
  return begin(stream, mode);
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* graph) {
  STREAM_OR_RETURN(stream, handle);
  return end(stream, graph);
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* out) {
  STREAM_OR_RETURN(stream, handle);
  std::lock_guard<std::mutex> lock(capture_mutex());
  auto& graph = stream->graph;
  *status = !graph                                      ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : graph->state == Graph::State::kCapturing ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                                       : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
  if (out) *out = graph.get();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(t_mode, *mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream_handle) {
  GRAPH_OR_RETURN(graph, handle);
  STREAM_OR_RETURN(stream, stream_handle);
  return enqueue(stream, {"graph " + std::to_string(graph->id), [graph] { return replay(*graph); }});
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
  return graphs().remove(handle) ? ACL_SUCCESS : fail(ACL_ERROR_RT_MODEL_CONTEXT, "aclmdlRIDestroy of an unknown graph");
}

// torch_npu calls this while the capture runs, through the handle of aclmdlRICaptureGetInfo: not yet in the registry.
aclError aclmdlRIGetId(aclmdlRI handle, uint32_t* id) {
  if (!handle || !id) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclmdlRIGetId of no graph");
  *id = static_cast<Graph*>(handle)->id;
  return ACL_SUCCESS;
}

aclError aclmdlRIDebugPrint(aclmdlRI handle) {
  GRAPH_OR_RETURN(graph, handle);
  for (auto& node : graph->nodes) fprintf(stderr, "[softnpu graph %u] %s\n", graph->id, node.group ? "task group" : node.work.name.c_str());
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  STREAM_OR_RETURN(stream, handle);
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (!stream->graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group needs a stream under capture");
  if (stream->graph->open_group) return fail(ACL_ERROR_RT_PARAM_INVALID, "a task group is open already");
  stream->graph->open_group = std::make_shared<TaskGroup>();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group) {
  STREAM_OR_RETURN(stream, handle);
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (!stream->graph || !stream->graph->open_group) return fail(ACL_ERROR_RT_PARAM_INVALID, "no task group is open on the stream");
  auto& graph = *stream->graph;
  graph.nodes.push_back({{"task group", nullptr}, graph.open_group});
  *group = graph.open_group.get();
  graph.open_group = nullptr;
  graph.frontiers[stream.get()][stream.get()] = graph.nodes.size();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  STREAM_OR_RETURN(stream, handle);
  if (!group) return fail(ACL_ERROR_RT_PARAM_INVALID, "the task group is null");
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (stream->updating) return fail(ACL_ERROR_RT_PARAM_INVALID, "the stream is updating a task group already");
  stream->updating = static_cast<TaskGroup*>(group)->shared_from_this();
  stream->update.clear();
  return ACL_SUCCESS;
}

// The update takes effect in the order of its stream: a replay that waits for an event recorded after it sees it.
aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  STREAM_OR_RETURN(stream, handle);
  std::shared_ptr<TaskGroup> group;
  std::vector<Work> works;
  {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!stream->updating) return fail(ACL_ERROR_RT_PARAM_INVALID, "the stream is not updating a task group");
    group.swap(stream->updating);
    works.swap(stream->update);
  }
  auto apply = [group, works] {
    std::lock_guard<std::mutex> lock(group->mutex);
    group->works = works;
    return ACL_SUCCESS;
  };
  return enqueue(stream, {"update of a task group", apply});
}

}  // extern "C"
