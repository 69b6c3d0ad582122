// The module fastdit._C. A kernel's file says what it offers in a `bind_NAME` of its own; here they are only called.
#include <pybind11/pybind11.h>

namespace fastdit {
void bind_adaln(pybind11::module_&);
void bind_adamw_ema(pybind11::module_&);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastdit's CPU kernels. They take addresses and trust them: call them through fastdit.kernels.";
  fastdit::bind_adaln(module);
  fastdit::bind_adamw_ema(module);
}
