// The compiled module as Python sees it; only the *bindings files know Python. Addresses come in as
// integers from tensors that gradloc/ops.py has checked and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "chunks.h"
#include "cpu/adamw_step.h"
#include "cpu/dispatch.h"
#include "cpu/norms.h"
#include "gradients_bindings.h"
#include "torch_bindings.h"
#include "watch_bindings.h"
#include "work.h"
#ifdef GRADLOC_CUDA
#include "cuda/runtime.h"
#include "cuda_bindings.h"
#endif

namespace py = pybind11;

namespace {

using gradloc::Addresses;
using gradloc::check_length;
using gradloc::DType;
using gradloc::dtypes;
using gradloc::PyGradients;
// lr, beta1, beta2, eps, weight_decay, maximize
using GroupTuple = std::tuple<double, double, double, double, double, bool>;

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
  std::vector<T*> out(addresses.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = reinterpret_cast<T*>(addresses[i]);
  return out;
}

PyGradients make_gradients(const Addresses& addresses, const std::vector<int32_t>& codes,
                           std::vector<py::object> kept) {
  check_length("codes", codes.size(), addresses.size());
  return {{pointers<const void>(addresses), dtypes(codes)}, std::move(kept)};
}

void take_norms(gradloc::Work& work, const PyGradients& grads, uintptr_t out, int num_threads) {
  check_length("grads", grads.list.data.size(), work.num_tensors());
  py::gil_scoped_release release;
  gradloc::cpu::layer_norm_sq(work, grads.list, reinterpret_cast<double*>(out), num_threads);
}

struct NormWork {
  gradloc::Work work;
};

struct AdamWWork {
  gradloc::Work work;
  gradloc::AdamWTensors tensors;

  AdamWWork(std::vector<int64_t> sizes, std::vector<int32_t> layers, int32_t num_layers,
            const Addresses& params, const std::vector<int32_t>& param_dtypes,
            const std::vector<int32_t>& moment_dtypes, const Addresses& exp_avgs,
            const Addresses& exp_avg_sqs, const Addresses& max_exp_avg_sqs, const Addresses& steps,
            std::vector<int32_t> groups, std::vector<int64_t> tensor_ids,
            std::vector<int64_t> first_elements, const Addresses& anchors,
            const std::vector<int32_t>& anchor_dtypes)
      : work(std::move(sizes), std::move(layers), num_layers),
        tensors{pointers<void>(params),        dtypes(param_dtypes),
                dtypes(moment_dtypes),         pointers<void>(exp_avgs),
                pointers<void>(exp_avg_sqs),   pointers<void>(max_exp_avg_sqs),
                pointers<float>(steps),        std::move(groups),
                std::move(tensor_ids),         std::move(first_elements),
                pointers<const void>(anchors), dtypes(anchor_dtypes)} {
    const size_t n = work.num_tensors();
    check_length("params", params.size(), n);
    check_length("param_dtypes", param_dtypes.size(), n);
    check_length("moment_dtypes", moment_dtypes.size(), n);
    check_length("exp_avgs", exp_avgs.size(), n);
    check_length("exp_avg_sqs", exp_avg_sqs.size(), n);
    check_length("max_exp_avg_sqs", max_exp_avg_sqs.size(), n);
    check_length("steps", steps.size(), n);
    check_length("groups", tensors.groups.size(), n);
    check_length("tensor_ids", tensors.tensor_ids.size(), n);
    check_length("first_elements", tensors.first_elements.size(), n);
    check_length("anchors", anchors.size(), anchors.empty() ? 0 : n);
    check_length("anchor_dtypes", anchor_dtypes.size(), anchors.size());
    gradloc::check_state_dtypes("moments", tensors.moment_dtypes);
    gradloc::check_state_dtypes("anchors", tensors.anchor_dtypes);
  }

  void step(const PyGradients& grads, const std::vector<GroupTuple>& group_tuples,
            const std::vector<double>& scales, double clip_coef, uintptr_t norm_sq_out,
            std::optional<uint64_t> rounding_seed,
            const std::optional<gradloc::RecAdamTuple>& recadam_tuple, int num_threads) {
    check_length("grads", grads.list.data.size(), work.num_tensors());
    check_length("scales", scales.size(), static_cast<size_t>(work.num_layers));
    std::vector<gradloc::AdamWGroup> groups;
    for (const auto& [lr, beta1, beta2, eps, weight_decay, maximize] : group_tuples) {
      groups.push_back(gradloc::adamw_group(lr, beta1, beta2, eps, weight_decay, maximize));
    }
    for (int32_t group : tensors.groups) {
      if (group < 0 || static_cast<size_t>(group) >= groups.size()) {
        throw std::invalid_argument("group " + std::to_string(group) + " has no hyperparameters");
      }
    }
    const std::optional<gradloc::RecAdam> recadam =
        gradloc::recadam_of(recadam_tuple, !tensors.anchors.empty());
    py::gil_scoped_release release;
    gradloc::cpu::adamw_step(work, tensors, grads.list, groups, scales, clip_coef,
                             reinterpret_cast<double*>(norm_sq_out), rounding_seed, recadam,
                             num_threads);
  }
};

py::dict build_info() {
  py::dict info;
  info["simd"] = std::string(gradloc::cpu::kernels().name);
  info["simd_available"] = gradloc::cpu::available_simd();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["compiler"] = GRADLOC_COMPILER;
#ifdef GRADLOC_CUDA
  const gradloc::cuda::RuntimeReport report = gradloc::cuda::runtime_report();
  info["cuda_compiled"] = report.compiled_version;
  info["cuda_devices"] = report.num_devices;
  info["cuda_status"] = report.status;
#else
  info["cuda_compiled"] = py::none();
  info["cuda_devices"] = 0;
  info["cuda_status"] = GRADLOC_WHY_NO_CUDA;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of gradloc: addresses and sizes in, numbers out. Use gradloc.ops.";
  m.attr("CHUNK_ELEMENTS") = gradloc::kChunkElements;

  m.def("build_info", &build_info, "How the module was built and what runs on this machine.");
  m.def("select_simd", &gradloc::cpu::select_simd, py::arg("name"),
        "Force an instruction set: 'auto', 'avx512', 'avx2' or 'plain'.");

  py::class_<PyGradients>(m, "Gradients",
                          "The gradients of a step, in the order of a work's tensors.")
      .def(py::init(&make_gradients), py::arg("addresses"), py::arg("codes"), py::arg("kept"))
      .def_property_readonly("addresses",
                             [](const PyGradients& self) {
                               Addresses addresses;
                               for (const void* grad : self.list.data) {
                                 addresses.push_back(reinterpret_cast<uintptr_t>(grad));
                               }
                               return addresses;
                             })
      .def_property_readonly("all_present",
                             [](const PyGradients& self) {
                               const auto& data = self.list.data;
                               return std::find(data.begin(), data.end(), nullptr) == data.end();
                             })
      .def_property_readonly("codes",
                             [](const PyGradients& self) {
                               std::vector<int32_t> codes;
                               for (DType dtype : self.list.dtypes) {
                                 codes.push_back(static_cast<int32_t>(dtype));
                               }
                               return codes;
                             })
      .def_property_readonly("present",
                             [](const PyGradients& self) {
                               std::vector<bool> present;
                               for (const void* grad : self.list.data) {
                                 present.push_back(grad != nullptr);
                               }
                               return present;
                             })
      .def_property_readonly("kept", [](const PyGradients& self) { return self.kept; });

  gradloc::register_torch(m);
  gradloc::register_watch(m);

  py::class_<NormWork>(m, "NormWork", "Tensors of which the layer norms are taken.")
      .def(
          py::init([](std::vector<int64_t> sizes, std::vector<int32_t> layers, int32_t num_layers) {
            return NormWork{gradloc::Work(std::move(sizes), std::move(layers), num_layers)};
          }),
          py::arg("sizes"), py::arg("layers"), py::arg("num_layers"))
      .def(
          "norm_sq",
          [](NormWork& self, const PyGradients& grads, uintptr_t out, int num_threads) {
            take_norms(self.work, grads, out, num_threads);
          },
          py::arg("grads"), py::arg("out"), py::arg("num_threads"),
          "Sums of squares by layer into `out`, float64 [num_layers].");

  py::class_<AdamWWork>(m, "AdamWWork", "Tensors that an AdamW step updates.")
      .def(py::init<std::vector<int64_t>, std::vector<int32_t>, int32_t, const Addresses&,
                    const std::vector<int32_t>&, const std::vector<int32_t>&, const Addresses&,
                    const Addresses&, const Addresses&, const Addresses&, std::vector<int32_t>,
                    std::vector<int64_t>, std::vector<int64_t>, const Addresses&,
                    const std::vector<int32_t>&>(),
           py::arg("sizes"), py::arg("layers"), py::arg("num_layers"), py::arg("params"),
           py::arg("param_dtypes"), py::arg("moment_dtypes"), py::arg("exp_avgs"),
           py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("groups"),
           py::arg("tensor_ids"), py::arg("first_elements"), py::arg("anchors"),
           py::arg("anchor_dtypes"))
      .def(
          "norm_sq",
          [](AdamWWork& self, const PyGradients& grads, uintptr_t out, int num_threads) {
            take_norms(self.work, grads, out, num_threads);
          },
          py::arg("grads"), py::arg("out"), py::arg("num_threads"),
          "Sums of squares by layer into `out`, float64 [num_layers].")
      .def("step", &AdamWWork::step, py::arg("grads"), py::arg("groups"), py::arg("scales"),
           py::arg("clip_coef"), py::arg("norm_sq_out"), py::arg("rounding_seed"),
           py::arg("recadam"), py::arg("num_threads"),
           "One AdamW step; `norm_sq_out` is 0 or the address of float64 [num_layers]. With a "
           "seed, bfloat16 storage is rounded stochastically. `recadam`: gamma, k, t0, anneal "
           "code, where there are anchors.");

#ifdef GRADLOC_CUDA
  gradloc::register_cuda(m);
#endif
}
