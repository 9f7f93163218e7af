// The part of vllm_ascend.vllm_ascend_C that vllm-ascend's sleep mode uses: memory that can be released and mapped again at
// the same address. What Python knows of an allocation is (device, size, address, pointer to the physical handle).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <memory>

#include "acl/acl.h"

namespace {

constexpr size_t kGrain = size_t{2} << 20;

PyObject* g_on_malloc = nullptr;
PyObject* g_on_free = nullptr;

struct Allocation {
  unsigned long long device, size, address, handle;  // the last is the address of an aclrtDrvMemHandle, null while unmapped

  void* start() const { return reinterpret_cast<void*>(address); }
  aclrtDrvMemHandle* physical() const { return reinterpret_cast<aclrtDrvMemHandle*>(handle); }
};

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

aclError create_and_map(const Allocation& wanted) {
  aclrtPhysicalMemProp properties{};
  properties.handleType = ACL_MEM_HANDLE_TYPE_NONE;
  properties.allocationType = ACL_MEM_ALLOCATION_TYPE_PINNED;
  properties.memAttr = ACL_HBM_MEM_HUGE;
  properties.location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = static_cast<uint32_t>(wanted.device);
  if (auto code = aclrtMallocPhysical(wanted.physical(), wanted.size, &properties, 0)) return code;
  auto code = aclrtMapMem(wanted.start(), wanted.size, 0, *wanted.physical(), 0);
  if (code) {
    aclrtFreePhysical(*wanted.physical());
    *wanted.physical() = nullptr;
  }
  return code;
}

aclError unmap_and_release(const Allocation& held) {
  if (!*held.physical()) return ACL_SUCCESS;  // asleep already
  if (auto code = aclrtUnmapMem(held.start())) return code;
  auto code = aclrtFreePhysical(*held.physical());
  *held.physical() = nullptr;
  return code;
}

PyObject* answer(aclError code, const char* what) {
  if (!code) Py_RETURN_NONE;
  const char* text = aclGetRecentErrMsg();
  return PyErr_Format(PyExc_RuntimeError, "%s failed with %d: %s", what, static_cast<int>(code), text ? text : "");
}

bool parse(PyObject* args, Allocation* out) { return PyArg_ParseTuple(args, "KKKK", &out->device, &out->size, &out->address, &out->handle); }

PyObject* python_create_and_map(PyObject*, PyObject* args) {
  Allocation wanted;
  return parse(args, &wanted) ? answer(create_and_map(wanted), "mapping memory of the NPU") : nullptr;
}

PyObject* python_unmap_and_release(PyObject*, PyObject* args) {
  Allocation held;
  if (!parse(args, &held)) return nullptr;
  aclError code;
  Py_BEGIN_ALLOW_THREADS;  // waits for the streams, whose tasks may need Python
  code = unmap_and_release(held);
  Py_END_ALLOW_THREADS;
  return answer(code, "releasing memory of the NPU");
}

PyObject* init_module(PyObject*, PyObject* args) {
  PyObject *on_malloc, *on_free;
  if (!PyArg_ParseTuple(args, "OO", &on_malloc, &on_free)) return nullptr;
  Py_INCREF(on_malloc);
  Py_INCREF(on_free);
  Py_XSETREF(g_on_malloc, on_malloc);
  Py_XSETREF(g_on_free, on_free);
  Py_RETURN_NONE;
}

PyMethodDef g_methods[] = {
    {"init_module", init_module, METH_VARARGS, "Registers the functions that record allocations and look them up."},
    {"python_create_and_map", python_create_and_map, METH_VARARGS, "Maps memory at a reserved address."},
    {"python_unmap_and_release", python_unmap_and_release, METH_VARARGS, "Releases the memory and keeps the address reserved."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef g_module = {PyModuleDef_HEAD_INIT, "vllm_ascend_C", nullptr, -1, g_methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" {

PyMODINIT_FUNC PyInit_vllm_ascend_C() { return PyModule_Create(&g_module); }

// Called by torch_npu's allocator; null is "out of memory".
void* my_malloc(ssize_t bytes, int device, aclrtStream) {
  if (bytes <= 0 || !g_on_malloc) return nullptr;
  size_t size = (static_cast<size_t>(bytes) + kGrain - 1) / kGrain * kGrain;
  void* address = nullptr;
  if (aclrtReserveMemAddress(&address, size, 0, nullptr, 0)) return nullptr;
  auto handle = std::make_unique<aclrtDrvMemHandle>(nullptr);
  Allocation made{static_cast<unsigned long long>(device), size, reinterpret_cast<uintptr_t>(address), reinterpret_cast<uintptr_t>(handle.get())};
  if (create_and_map(made)) {
    aclrtReleaseMemAddress(address);
    return nullptr;
  }
  Gil gil;
  PyObject* result = PyObject_CallFunction(g_on_malloc, "((KKKK))", made.device, made.size, made.address, made.handle);
  if (!result) PyErr_WriteUnraisable(g_on_malloc);
  Py_XDECREF(result);
  handle.release();
  return address;
}

void my_free(void* address, ssize_t, int, aclrtStream) {
  if (!g_on_free || !Py_IsInitialized()) return;  // the process ends, and its memory with it
  Allocation held;
  {
    Gil gil;
    PyObject* asked = PyObject_CallFunction(g_on_free, "K", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(address)));
    bool found = asked && parse(asked, &held);
    if (!found) PyErr_WriteUnraisable(g_on_free);
    Py_XDECREF(asked);
    if (!found) return;
  }
  unmap_and_release(held);
  aclrtReleaseMemAddress(address);
  delete held.physical();
}

}  // extern "C"
