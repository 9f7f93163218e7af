// What the libraries of the software NPU offer one another. libascendcl.so defines all of it;
// libhccl.so, libacl_op_compiler.so, libopapi.so and the operator library call it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "acl/acl.h"

namespace softnpu {

// A piece of device work. Runs on the thread of its stream. A result other than ACL_SUCCESS stops the context of the
// stream's device, or, where no stream of it was set to stop on failure, is returned by the stream's next synchronisation.
using Task = std::function<aclError()>;

// Appends a task to the stream's in-order queue, or to the graph that the stream is capturing.
// `stream` may be null: the default stream of the calling thread's device.
aclError enqueue(aclrtStream stream, std::string name, Task task);

// True while the stream records into a graph (capture or task-group update).
bool capturing(aclrtStream stream);
// Why an asynchronous copy between these addresses, where one is pageable memory, is refused; ACL_SUCCESS where it is not:
// CANN makes it a synchronous one, which a capture forbids.
aclError check_pageable(const void* to, const void* from, aclrtStream stream);

// ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, and the captures are invalidated, when `call` is forbidden
// to this thread because a capture is in progress; else ACL_SUCCESS.
aclError forbid_in_capture(const char* call);

// Called once by HcclCommInit*/HcclCommDestroy: the node's table counts communicators per process.
void count_communicators(int delta);

// Reports that a captured operation occupies one more hardware stream of the graph (HCCL does, one
// for each communicator). `owner` distinguishes different occupants.
aclError reserve_graph_stream(aclrtStream stream, const void* owner);

// Text that aclGetRecentErrMsg returns to the calling thread. Returns `code`, so that a failing
// call reads `return fail(ACL_ERROR_RT_PARAM_INVALID, "...")`.
aclError fail(aclError code, const std::string& message);
std::string last_error();

// The device of the calling thread: index into the visible list, or -1; and the same as the driver counts, or -1.
// A thread that has set none opens the default device of aclInit's configuration, if that has one.
int visible_device();
int physical_device();

// True once a task has failed in the context of the calling thread's device, or its tasks are being aborted: a task that
// waits for something must end.
bool device_stopped();

// Identity of the node: equal for two processes exactly if they share a node (SOFTNPU_NODE, else the
// network namespace). Two processes of one node also share /dev/shm.
const std::string& node_key();

// Whether the software NPU enforces this rule of CANN (a name of kRules in settings.cpp). True, unless SOFTNPU_STRICT is
// "0" or holds "-RULE": for whoever looks for the cause of an error, never for tests.
bool strict(const char* rule);

// Seconds from the environment variable `name` if it is a number above zero, else `fallback`.
double seconds_setting(const char* name, double fallback);

// A fault injected by SOFTNPU_FAULTS, "kind:key=value,key=value;kind:..." or "@FILE" with such text
// (read again when the file changes). Every key of `facts` that the fault names must have the named
// value; `nth=N` matches the Nth otherwise matching call of this process only, `after=N` all calls
// past the Nth. Returns the fault's settings.
//   open_device:device=P            aclrtSetDevice of physical device P fails
//   device_error:device=P[,task=T]  a task (named T) of physical device P fails with 507015: its context stops
//   capture                         aclmdlRICaptureEnd fails
//   hccl_silent:rank=R[,comm=NAME]  rank R takes part in no further HCCL operation: its task never ends
//   link_setup[:rank=R][,comm=NAME][,op=OP][,code=N]  link set-up in the first call of an operator hangs, or fails with N
//   rdma_error[:rank=R][,comm=NAME]  HcclGetCommAsyncError answers 21
//   destroy_again[:comm=NAME]        HcclCommDestroy answers 20
//   unseen_death[:rank=R]            rank R's operations do not notice that a peer is gone
//   npu_port_in_use[:device=P]       HCCL's port of physical device P is taken
//   slow_link:ms=M[,mbps=B]         every HCCL message between nodes is delayed, and paced
using Fault = std::map<std::string, std::string>;
std::optional<Fault> fault(const std::string& kind, const std::map<std::string, std::string>& facts = {});

// Writes one line to standard error when SOFTNPU_LOG is at or above `level` (0 quiet, 1 errors (the default), 2 calls
// that create or destroy, 3 every task).
void log(int level, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace softnpu
