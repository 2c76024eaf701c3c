// numpy in, numpy out: the helpers of the test module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <thread>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/parallel.h"
#include "rcp/float_types.h"

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Starts threads for every call: the thread sanitizer and the address sanitizer then see them end.
inline rcp::ThreadPool thread_pool(int threads) {
  return {threads, [](int workers, void (*body)(void*), void* context) {
            std::vector<std::thread> others;
            for (int i = 1; i < workers; ++i) others.emplace_back(body, context);
            body(context);
            for (std::thread& t : others) t.join();
          }};
}

inline rcp::FloatType float_type(const std::string& name) {
  if (name == "float32") return rcp::FloatType::float32;
  if (name == "float16") return rcp::FloatType::float16;
  if (name == "bfloat16") return rcp::FloatType::bfloat16;
  throw std::invalid_argument("float type must be float32, float16 or bfloat16, got " + name);
}

inline void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

inline rcp::Isa isa_of(int isa) {
  return rcp::checked_isa(static_cast<rcp::Isa>(isa), "isa");
}

// Each adds the functions of one file to the module.
void add_caches(py::module_& m);
void add_levels(py::module_& m);
