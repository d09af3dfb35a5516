// The module gradloc_emulated: the bindings of gradloc's CUDA core, compiled for the emulator, and
// what a test may ask of the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "controls.h"
#include "cuda_bindings.h"

namespace py = pybind11;

namespace {

py::tuple tuple_of(dim3 size) { return py::make_tuple(size.x, size.y, size.z); }

void add_controls(py::module_& m) {
  // A tuple with names, as Python's own modules return them.
  m.attr("Launch") =
      py::module_::import("collections")
          .attr("namedtuple")("Launch", "kernel grid block param_bytes stream device");
  m.def("reset", &emulator::reset,
        "Two devices, no streams, seed 0, nothing recorded, nothing to fail, device 0 current.");
  m.def("set_seed", &emulator::set_seed, py::arg("seed"),
        "The order of blocks and threads is a function of it, and of how many launches followed.");
  m.def(
      "launches",
      [record = m.attr("Launch")] {
        py::list list;
        for (const emulator::Launch& launch : emulator::launches()) {
          list.append(record(launch.kernel, tuple_of(launch.grid), tuple_of(launch.block),
                             launch.param_bytes, launch.stream, launch.device));
        }
        return list;
      },
      "What ran since the list was cleared, oldest first.");
  m.def("clear_launches", &emulator::clear_launches);
  m.def(
      "fail_next_launch",
      [](int error) { emulator::fail_next_launch(static_cast<cudaError_t>(error)); },
      py::arg("error"), "The next launch runs nothing and returns this number of an error.");
  m.def(
      "last_error_text", [] { return emulator::last_error_text(); },
      "What the emulator found when it last returned an error.");
  m.def("set_device_count", &emulator::set_device_count, py::arg("count"));
  m.def("new_stream", &emulator::new_stream, py::arg("device"), "A stream of that device.");
  m.def("current_device", [] {
    int device = -1;
    cudaGetDevice(&device);
    return device;
  });
}

}  // namespace

PYBIND11_MODULE(gradloc_emulated, m) {
  gradloc::register_cuda(m);
  add_controls(m);
}
