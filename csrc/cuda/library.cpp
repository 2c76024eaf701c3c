// The empty Python module whose import registers the CUDA kernels; the schemas are in rcp_kernels._C.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C_cuda",
                               "CUDA kernels of rcp_kernels; see torch.ops.rcp_kernels.",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
