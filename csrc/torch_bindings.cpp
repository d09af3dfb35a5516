// Finds out, when the first optimizer is made, how this torch keeps a tensor in a Python object,
// and refuses what it does not know; gradloc/watch.py then does without. Reads no tensor of a user.
#include "torch_bindings.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace gradloc {
namespace {

uintptr_t word_at(const void* address) {
  uintptr_t word;
  std::memcpy(&word, address, sizeof(word));
  return word;
}

template <class F>
void take(const py::object& functions, const char* name, F& function) {
  function = reinterpret_cast<F>(functions[name].cast<uintptr_t>());
}

py::object describe(const TorchInterface& interface, TensorHandle tensor) {
  TensorView view;
  if (!read_tensor(interface.torch(), tensor, view)) return py::none();
  py::list sizes;
  py::list strides;
  for (int64_t i = 0; i < view.dim; ++i) {
    sizes.append(view.sizes[i]);
    strides.append(view.strides[i]);
  }
  DType dtype = DType::kFloat32;
  const bool known = core_dtype(interface.torch(), view.dtype, dtype);
  return py::make_tuple(reinterpret_cast<uintptr_t>(view.data), py::tuple(sizes),
                        py::tuple(strides), known ? static_cast<int>(dtype) : -1,
                        view.device_type == interface.torch().cpu ? "cpu" : "cuda",
                        interface.is_neg(tensor));
}

py::object describe_tensor(const TorchInterface& interface, const py::object& tensor) {
  if (!interface.is_plain(tensor.ptr())) return py::none();
  return describe(interface, interface.handle(tensor.ptr()));
}

py::object describe_grad(const TorchInterface& interface, const py::object& param) {
  py::object made;
  TensorHandle grad = nullptr;
  if (!interface.is_plain(param.ptr()) || !interface.grad(param.ptr(), made, grad) ||
      grad == nullptr) {
    return py::none();
  }
  return describe(interface, grad);
}

}  // namespace

TorchInterface::TorchInterface(const py::object& functions, const py::object& codes,
                               const py::object& tensor, const py::object& handle,
                               py::object parameter_class)
    : tensor_class_(py::type::of(tensor)), parameter_class_(std::move(parameter_class)) {
  take(functions, "aoti_torch_get_layout", torch_.get_layout);
  take(functions, "aoti_torch_get_device_type", torch_.get_device_type);
  take(functions, "aoti_torch_get_device_index", torch_.get_device_index);
  take(functions, "aoti_torch_get_dtype", torch_.get_dtype);
  take(functions, "aoti_torch_get_dim", torch_.get_dim);
  take(functions, "aoti_torch_get_sizes", torch_.get_sizes);
  take(functions, "aoti_torch_get_strides", torch_.get_strides);
  take(functions, "aoti_torch_get_data_ptr", torch_.get_data_ptr);
  take(functions, "aoti_torch_is_defined", torch_.is_defined);
  take(functions, "aoti_torch_new_uninitialized_tensor", torch_.new_handle);
  take(functions, "aoti_torch_assign_tensors", torch_.assign);
  take(functions, "aoti_torch_delete_tensor_object", torch_.delete_handle);
  take(functions, "is_neg", torch_.is_neg);
  take(functions, "grad", torch_.grad);
  if ((torch_.is_neg == nullptr) != (torch_.grad == nullptr)) {
    throw std::invalid_argument("is_neg and grad are known both, or neither");
  }
  torch_.strided = codes["strided"].cast<int32_t>();
  torch_.cpu = codes["cpu"].cast<int32_t>();
  torch_.cuda = codes["cuda"].cast<int32_t>();
  torch_.dtypes[static_cast<int>(DType::kFloat32)] = codes["float32"].cast<int32_t>();
  torch_.dtypes[static_cast<int>(DType::kBFloat16)] = codes["bfloat16"].cast<int32_t>();
  torch_.dtypes[static_cast<int>(DType::kFloat16)] = codes["float16"].cast<int32_t>();
  find_handle(tensor, handle);
}

// Where the at::Tensor stands depends on torch's version: it is the one word of the Python object
// that holds what `_cdata` says. That an at::Tensor is no more than this word, torch's own handle
// to the same tensor shows.
void TorchInterface::find_handle(const py::object& tensor, const py::object& handle) {
  const auto impl = tensor.attr("_cdata").cast<uintptr_t>();
  const void* at_tensor = PyCapsule_GetPointer(handle.ptr(), PyCapsule_GetName(handle.ptr()));
  if (at_tensor == nullptr) throw py::error_already_set();
  const auto* bytes = reinterpret_cast<const char*>(tensor.ptr());
  const auto end = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  int num_found = 0;
  for (size_t at = sizeof(PyObject); at + sizeof(uintptr_t) <= end; at += sizeof(uintptr_t)) {
    if (word_at(bytes + at) == impl) {
      offset_ = at;
      ++num_found;
    }
  }
  if (num_found != 1 || word_at(at_tensor) != impl) {
    throw std::runtime_error("this torch keeps its tensors in a way that is not known here");
  }
}

bool TorchInterface::ask_is_neg(TensorHandle tensor) const {
  // Without torch's functions every handle is that of a Python object.
  const char* object = static_cast<const char*>(tensor) - offset_;
  const py::handle self(reinterpret_cast<PyObject*>(const_cast<char*>(object)));
  return self.attr(is_neg_name_)().cast<bool>();
}

bool TorchInterface::ask_grad(PyObject* param, py::object& made, TensorHandle& grad) const {
  made = py::handle(param).attr(grad_name_);
  grad = nullptr;
  if (made.is_none()) return true;
  if (!is_plain(made.ptr())) return false;
  grad = handle(made.ptr());
  return true;
}

void register_torch(py::module_& m) {
  py::class_<TorchInterface>(m, "TorchInterface", "How torch's tensors are read.")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&,
                    py::object>(),
           py::arg("functions"), py::arg("codes"), py::arg("tensor"), py::arg("handle"),
           py::arg("parameter_class"))
      .def("describe", &describe_tensor, py::arg("tensor"),
           "Address, sizes, strides, dtype code (-1: another dtype), device type, is_neg; None for "
           "what is not an ordinary tensor.")
      .def("describe_grad", &describe_grad, py::arg("param"), "The same of its gradient.");
}

}  // namespace gradloc
