// A library that only has to be there: libtorch_npu.so names it and takes nothing from it at run time.
extern "C" const char softnpu_empty_library[] = "part of ascend-softnpu";
