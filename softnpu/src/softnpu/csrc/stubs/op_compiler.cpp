// libacl_op_compiler.so: the graph-engine way to run an operator. Descriptors are real, execution is refused, and the
// stream is stopped: else torch_npu would continue with what the output held before.
#include <cstring>
#include <string>
#include <vector>

#include "acl/acl_op.h"
#include "acl/acl_op_compiler.h"
#include "softnpu.h"

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> sizes;
};
struct aclDataBuffer {
  void* address;
  size_t size;
};
struct aclopAttr {};

namespace {
aclError refuse(const char* op, aclrtStream stream) {
  std::string text = std::string("the software NPU has no operator ") + op;
  softnpu::enqueue(stream, op, [text] { return softnpu::fail(ACL_ERROR_OP_NOT_FOUND, text); });
  return softnpu::fail(ACL_ERROR_OP_NOT_FOUND, text);
}
}  // namespace

extern "C" {

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* sizes, aclFormat format) {
  return new aclTensorDesc{type, format, std::vector<int64_t>(sizes, sizes + count)};
}
void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  if (index >= desc->sizes.size()) return ACL_ERROR_INVALID_PARAM;
  *size = desc->sizes[index];
  return ACL_SUCCESS;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->sizes.size(); }
aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
  desc->format = format;
  return ACL_SUCCESS;
}
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }

aclDataBuffer* aclCreateDataBuffer(void* address, size_t size) { return new aclDataBuffer{address, size}; }
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }

aclError aclopCompileAndExecute(const char* op, int, const aclTensorDesc* const*, const aclDataBuffer* const*, int, const aclTensorDesc* const*,
                                aclDataBuffer* const*, const aclopAttr*, aclopEngineType, aclopCompileType, const char*, aclrtStream stream) {
  return refuse(op, stream);
}
aclError aclopCompileAndExecuteV2(const char* op, int, aclTensorDesc**, aclDataBuffer**, int, aclTensorDesc**, aclDataBuffer**, aclopAttr*, aclopEngineType,
                                  aclopCompileType, const char*, aclrtStream stream) {
  return refuse(op, stream);
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t capacity) {
  strncpy(value, "disable", capacity);
  return ACL_SUCCESS;
}

}  // extern "C"
