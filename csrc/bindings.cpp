// Defines the module fastdit._C. Each kernel's file defines its functions in a `bind_NAME`, which is called here.
#include <pybind11/pybind11.h>

namespace fastdit {
void bind_adaln(pybind11::module_&);
void bind_adamw_ema(pybind11::module_&);
void bind_philox(pybind11::module_&);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastdit's CPU kernels. They do not check addresses: call them through fastdit.kernels.";
  fastdit::bind_adaln(module);
  fastdit::bind_adamw_ema(module);
  fastdit::bind_philox(module);
}
