// Names that libtorch_npu.so must find when it is loaded and that have no function here: profiling, dumps, logging to CANN's
// files, and kernels as binaries. Own file without CANN's headers, so that one C signature serves all. Calls that
// would have to compute something fail, the others succeed.
#include <cstdio>

#define SUCCEEDS(name) \
  extern "C" long name(...) { return 0; }
#define REFUSES(name)                                                                       \
  extern "C" long name(...) {                                                               \
    fprintf(stderr, "[softnpu] " #name ": the software NPU has no binary kernels\n");       \
    return 207000; /* ACL_ERROR_RT_FEATURE_NOT_SUPPORT */                                   \
  }

SUCCEEDS(MsprofGetHashId)
SUCCEEDS(MsprofRegisterCallback)
SUCCEEDS(MsprofReportAdditionalInfo)
SUCCEEDS(MsprofReportApi)
SUCCEEDS(MsprofReportCompactInfo)
SUCCEEDS(MsprofSysCycleTime)
SUCCEEDS(aclAppLog)
SUCCEEDS(aclmdlInitDump)
SUCCEEDS(aclmdlSetDump)
SUCCEEDS(aclmdlFinalizeDump)
REFUSES(aclrtBinaryLoadFromData)
REFUSES(aclrtBinaryGetFunction)
REFUSES(aclrtGetFunctionAddr)
REFUSES(rtDevBinaryRegister)
REFUSES(rtFunctionRegister)
REFUSES(rtGetC2cCtrlAddr)
REFUSES(rtKernelLaunch)
