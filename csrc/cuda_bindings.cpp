// The CUDA backend as Python sees it. Addresses come in as integers: of device memory that
// gradloc/ops_cuda.py takes from torch and keeps alive, and of host memory to be copied there.
#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/adamw_step.h"
#include "cuda/norms.h"
#include "cuda/runtime.h"
#include "cuda/tables.h"
#include "gradients_bindings.h"

namespace py = pybind11;

namespace gradloc {
namespace {

using cuda::Control;
using cuda::Decision;
using cuda::GradAddresses;
using cuda::GroupEntry;
using cuda::HostTables;
using cuda::Target;
using cuda::TensorEntry;

// lr, beta1, beta2, eps, weight_decay, maximize, address of the learning rate on the device or 0
using GroupTuple = std::tuple<double, double, double, double, double, bool, uintptr_t>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where the tables and the scratch memory lie, and where to launch.
struct Place {
  uintptr_t tables, scratch;
  Target target;
};

struct CudaWork {
  HostTables host;
  // [num_tensors] as the tables have them; of a tensor without a gradient, that of its last one.
  std::vector<DType> grad_dtypes;

  // Whether the tables are written for gradients of these dtypes.
  bool written_for(const PyGradients& grads) const {
    check_length("grads", grads.list.data.size(), host.num_tensors());
    for (size_t i = 0; i < grad_dtypes.size(); ++i) {
      if (grads.list.data[i] != nullptr && grads.list.dtypes[i] != grad_dtypes[i]) return false;
    }
    return true;
  }

  void take_dtypes(const PyGradients& grads) {
    check_length("grads", grads.list.data.size(), host.num_tensors());
    for (size_t i = 0; i < grad_dtypes.size(); ++i) {
      if (grads.list.data[i] != nullptr) grad_dtypes[i] = grads.list.dtypes[i];
    }
  }

  GradAddresses addresses(const PyGradients& grads, uintptr_t table) const {
    check_length("grads", grads.list.data.size(), host.num_tensors());
    if (table == 0 && host.num_tensors() > static_cast<size_t>(cuda::kLargeCapacity)) {
      throw std::invalid_argument("more than " + std::to_string(cuda::kLargeCapacity) +
                                  " tensors need a table of gradients on the device");
    }
    return {grads.list.data, at<const void* const>(table)};
  }

  void norm_sq(const Place& place, const PyGradients& grads, uintptr_t grad_table, uintptr_t out,
               const Decision& decision) const {
    const GradAddresses list = addresses(grads, grad_table);
    py::gil_scoped_release release;
    cuda::layer_norm_sq(host.at(at<char>(place.tables)), host.scratch_at(at<char>(place.scratch)),
                        at<double>(out), decision, list, place.target);
  }
};

struct CudaNormWork : CudaWork {
  void write_tables(uintptr_t out, const PyGradients& grads) {
    take_dtypes(grads);
    host.write(at<char>(out), grad_dtypes, {}, {});
  }
};

std::vector<GroupEntry> group_entries(const std::vector<GroupTuple>& tuples) {
  std::vector<GroupEntry> groups;
  for (const auto& [lr, beta1, beta2, eps, weight_decay, maximize, lr_address] : tuples) {
    groups.push_back(
        {adamw_group(lr, beta1, beta2, eps, weight_decay, maximize), at<const float>(lr_address)});
  }
  return groups;
}

struct CudaAdamWWork : CudaWork {
  std::vector<TensorEntry> tensors;
  int32_t num_groups = 0;
  bool amsgrad = false, anchored = false;

  void write_tables(uintptr_t out, const PyGradients& grads, const std::vector<double>& scales) {
    check_length("scales", scales.size(), static_cast<size_t>(host.num_layers()));
    take_dtypes(grads);
    host.write(at<char>(out), grad_dtypes, tensors, scales);
  }

  void step(const Place& place, const PyGradients& grads, uintptr_t grad_table,
            const std::vector<GroupTuple>& group_tuples, uintptr_t group_table, uintptr_t control,
            double grad_coef, uintptr_t norm_sq_out, std::optional<uint64_t> rounding_seed,
            const std::optional<RecAdamTuple>& recadam) const {
    const GradAddresses list = addresses(grads, grad_table);
    const std::vector<GroupEntry> groups = group_entries(group_tuples);
    if (groups.size() < static_cast<size_t>(num_groups)) {
      throw std::invalid_argument("group " + std::to_string(groups.size()) +
                                  " has no hyperparameters");
    }
    if (group_table == 0 && groups.size() > static_cast<size_t>(cuda::kMaxInlineGroups)) {
      throw std::invalid_argument("more than " + std::to_string(cuda::kMaxInlineGroups) +
                                  " param groups need a table of them on the device");
    }
    const cuda::StepOptions options = {
        groups,    at<const GroupEntry>(group_table), at<const Control>(control),
        grad_coef, at<double>(norm_sq_out),           rounding_seed,
        amsgrad,   recadam_of(recadam, anchored)};
    py::gil_scoped_release release;
    cuda::adamw_step(host.at(at<char>(place.tables)), host.scratch_at(at<char>(place.scratch)),
                     options, list, place.target);
  }
};

CudaAdamWWork make_adamw_work(const std::vector<int64_t>& sizes, const std::vector<int32_t>& layers,
                              int32_t num_layers, const Addresses& params,
                              const std::vector<int32_t>& param_dtypes,
                              const std::vector<int32_t>& moment_dtypes, const Addresses& exp_avgs,
                              const Addresses& exp_avg_sqs, const Addresses& max_exp_avg_sqs,
                              const Addresses& steps, const std::vector<int32_t>& groups,
                              const std::vector<int64_t>& tensor_ids,
                              const std::vector<int64_t>& first_elements, const Addresses& anchors,
                              const std::vector<int32_t>& anchor_dtypes) {
  CudaAdamWWork work{{HostTables(sizes, layers, num_layers), dtypes(param_dtypes)}, {}};
  const size_t n = work.host.num_tensors();
  check_length("params", params.size(), n);
  check_length("param_dtypes", param_dtypes.size(), n);
  check_length("moment_dtypes", moment_dtypes.size(), n);
  check_length("exp_avgs", exp_avgs.size(), n);
  check_length("exp_avg_sqs", exp_avg_sqs.size(), n);
  check_length("max_exp_avg_sqs", max_exp_avg_sqs.size(), n);
  check_length("steps", steps.size(), n);
  check_length("groups", groups.size(), n);
  check_length("tensor_ids", tensor_ids.size(), n);
  check_length("first_elements", first_elements.size(), n);
  work.anchored = !anchors.empty();
  check_length("anchors", anchors.size(), work.anchored ? n : 0);
  check_length("anchor_dtypes", anchor_dtypes.size(), anchors.size());
  const std::vector<DType> of_params = dtypes(param_dtypes), of_moments = dtypes(moment_dtypes),
                           of_anchors = dtypes(anchor_dtypes);
  check_state_dtypes("moments", of_moments);
  check_state_dtypes("anchors", of_anchors);
  for (size_t i = 0; i < n; ++i) {
    if (groups[i] < 0) throw std::invalid_argument("a param group's index is negative");
    work.num_groups = std::max(work.num_groups, groups[i] + 1);
    work.amsgrad = work.amsgrad || max_exp_avg_sqs[i] != 0;
    work.tensors.push_back({at<void>(params[i]), at<void>(exp_avgs[i]), at<void>(exp_avg_sqs[i]),
                            at<void>(max_exp_avg_sqs[i]), at<float>(steps[i]), tensor_ids[i],
                            first_elements[i], groups[i], layers[i], of_params[i], of_moments[i],
                            work.anchored ? of_anchors[i] : DType::kFloat32,
                            work.anchored ? at<const void>(anchors[i]) : nullptr});
  }
  return work;
}

Place place(uintptr_t tables, uintptr_t scratch, int device, uintptr_t stream) {
  return {tables, scratch, {device, at<std::remove_pointer_t<cudaStream_t>>(stream)}};
}

}  // namespace

void register_cuda(py::module_& m) {
  m.attr("MAX_INLINE_TENSORS") = cuda::kLargeCapacity;
  m.attr("MAX_INLINE_GROUPS") = cuda::kMaxInlineGroups;
  m.attr("GROUP_BYTES") = sizeof(GroupEntry);
  m.def("kernel_problem", &cuda::kernel_problem, py::arg("device"),
        "Why kernels cannot run on this device; empty when they can.");
  m.def(
      "write_groups",
      [](uintptr_t out, const std::vector<GroupTuple>& groups) {
        const std::vector<GroupEntry> entries = group_entries(groups);
        std::copy(entries.begin(), entries.end(), at<GroupEntry>(out));
      },
      py::arg("out"), py::arg("groups"), "Param groups into host memory, GROUP_BYTES each.");
  m.def(
      "write_gradients",
      [](uintptr_t out, const PyGradients& grads) {
        std::copy(grads.list.data.begin(), grads.list.data.end(), at<const void*>(out));
      },
      py::arg("out"), py::arg("grads"), "Addresses of gradients into host memory, 8 bytes each.");

  // Local to the module: the emulator's module has classes of the same names.
  py::class_<CudaNormWork>(m, "CudaNormWork", py::module_local(),
                           "Tensors of which a device takes the layer norms.")
      .def(py::init([](const std::vector<int64_t>& sizes, const std::vector<int32_t>& layers,
                       int32_t num_layers) {
             HostTables host(sizes, layers, num_layers);
             return CudaNormWork{{host, std::vector<DType>(sizes.size(), DType::kFloat32)}};
           }),
           py::arg("sizes"), py::arg("layers"), py::arg("num_layers"))
      .def_property_readonly("table_bytes",
                             [](const CudaNormWork& self) { return self.host.table_bytes(); })
      .def_property_readonly("scratch_bytes",
                             [](const CudaNormWork& self) { return self.host.scratch_bytes(); })
      .def("written_for", &CudaNormWork::written_for, py::arg("grads"),
           "Whether the tables were last written for gradients of these dtypes.")
      .def("write_tables", &CudaNormWork::write_tables, py::arg("out"), py::arg("grads"),
           "The tables into host memory, table_bytes of it.")
      .def(
          "norm_sq",
          [](const CudaNormWork& self, uintptr_t tables, uintptr_t scratch,
             const PyGradients& grads, uintptr_t grad_table, uintptr_t out, int device,
             uintptr_t stream) {
            self.norm_sq(place(tables, scratch, device, stream), grads, grad_table, out, {});
          },
          py::arg("tables"), py::arg("scratch"), py::arg("grads"), py::arg("grad_table"),
          py::arg("out"), py::arg("device"), py::arg("stream"),
          "Sums of squares by layer into `out`, float64 [num_layers] on the device.");

  py::class_<CudaAdamWWork>(m, "CudaAdamWWork", py::module_local(),
                            "Tensors that an AdamW step on a device updates.")
      .def(py::init(&make_adamw_work), py::arg("sizes"), py::arg("layers"), py::arg("num_layers"),
           py::arg("params"), py::arg("param_dtypes"), py::arg("moment_dtypes"),
           py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"),
           py::arg("steps"), py::arg("groups"), py::arg("tensor_ids"), py::arg("first_elements"),
           py::arg("anchors"), py::arg("anchor_dtypes"))
      .def_property_readonly("table_bytes",
                             [](const CudaAdamWWork& self) { return self.host.table_bytes(); })
      .def_property_readonly("scratch_bytes",
                             [](const CudaAdamWWork& self) { return self.host.scratch_bytes(); })
      .def("written_for", &CudaAdamWWork::written_for, py::arg("grads"),
           "Whether the tables were last written for gradients of these dtypes.")
      .def("write_tables", &CudaAdamWWork::write_tables, py::arg("out"), py::arg("grads"),
           py::arg("scales"), "The tables into host memory, table_bytes of it.")
      .def(
          "norm_sq",
          [](const CudaAdamWWork& self, uintptr_t tables, uintptr_t scratch,
             const PyGradients& grads, uintptr_t grad_table, uintptr_t out, uintptr_t control,
             double max_norm, bool skip_nonfinite, uintptr_t found_inf, uintptr_t grad_scale,
             int device, uintptr_t stream) {
            const Decision decision = {at<Control>(control), max_norm, at<const float>(found_inf),
                                       at<const float>(grad_scale), skip_nonfinite};
            self.norm_sq(place(tables, scratch, device, stream), grads, grad_table, out, decision);
          },
          py::arg("tables"), py::arg("scratch"), py::arg("grads"), py::arg("grad_table"),
          py::arg("out"), py::arg("control"), py::arg("max_norm"), py::arg("skip_nonfinite"),
          py::arg("found_inf"), py::arg("grad_scale"), py::arg("device"), py::arg("stream"),
          "Sums of squares by layer into `out`, float64 [num_layers] on the device; with a control "
          "(float32 [3]: coefficient, skip, skipped so far) also what the step does.")
      .def(
          "step",
          [](const CudaAdamWWork& self, uintptr_t tables, uintptr_t scratch,
             const PyGradients& grads, uintptr_t grad_table, const std::vector<GroupTuple>& groups,
             uintptr_t group_table, uintptr_t control, double grad_coef, uintptr_t norm_sq_out,
             std::optional<uint64_t> rounding_seed, const std::optional<RecAdamTuple>& recadam,
             int device, uintptr_t stream) {
            self.step(place(tables, scratch, device, stream), grads, grad_table, groups,
                      group_table, control, grad_coef, norm_sq_out, rounding_seed, recadam);
          },
          py::arg("tables"), py::arg("scratch"), py::arg("grads"), py::arg("grad_table"),
          py::arg("groups"), py::arg("group_table"), py::arg("control"), py::arg("grad_coef"),
          py::arg("norm_sq_out"), py::arg("rounding_seed"), py::arg("recadam"), py::arg("device"),
          py::arg("stream"),
          "One AdamW step; `norm_sq_out` is 0 or the address of float64 [num_layers]. With a "
          "seed, bfloat16 storage is rounded stochastically. `recadam`: gamma, k, t0, anneal code, "
          "where there are anchors.");
}

}  // namespace gradloc
