// How the compiled module gets from a tensor in Python to what torch's C interface says of it.
// Which tensors are read, and when, is in watch_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

#include "torch_tensor.h"

namespace gradloc {

// torch's functions, and where in a Python tensor the at::Tensor stands.
class TorchInterface {
 public:
  // functions: dict, addresses by name; codes: dict, torch's numbers by name; tensor: any, of the
  // class torch.Tensor; handle: a capsule with torch's own handle to it.
  TorchInterface(const pybind11::object& functions, const pybind11::object& codes,
                 const pybind11::object& tensor, const pybind11::object& handle,
                 pybind11::object parameter_class);

  const TorchFunctions& torch() const { return torch_; }

  // Not a subclass, which may keep its values elsewhere.
  bool is_plain(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_class_.ptr() || type == parameter_class_.ptr();
  }

  // Of an object that is_plain.
  TensorHandle handle(PyObject* tensor) const {
    return reinterpret_cast<const char*>(tensor) + offset_;
  }

  // Whether there is a lazy minus sign, which the memory does not show.
  bool is_neg(TensorHandle tensor) const {
    return torch_.is_neg != nullptr ? torch_.is_neg(tensor) : ask_is_neg(tensor);
  }

  // The gradient of a parameter, null when it has none; false when it is of a subclass and may keep
  // its values elsewhere. Where torch's function is known, no Python object is made for it, which
  // would take most of the time; a subclass then shows by having no memory. `made` is what has to
  // live until the gradient has got another owner.
  bool grad(PyObject* param, pybind11::object& made, TensorHandle& grad) const {
    if (torch_.grad == nullptr) return ask_grad(param, made, grad);
    grad = torch_.grad(impl(param));
    bool defined = false;
    if (torch_.is_defined(grad, &defined) != 0) return false;
    if (!defined) grad = nullptr;
    return true;
  }

 private:
  const void* impl(PyObject* tensor) const {
    return *static_cast<const void* const*>(handle(tensor));
  }
  bool ask_is_neg(TensorHandle tensor) const;
  bool ask_grad(PyObject* param, pybind11::object& made, TensorHandle& grad) const;
  void find_handle(const pybind11::object& tensor, const pybind11::object& handle);

  TorchFunctions torch_{};
  size_t offset_ = 0;  // bytes from the start of a Python tensor to its at::Tensor
  pybind11::object tensor_class_;
  pybind11::object parameter_class_;
  pybind11::str grad_name_{"grad"};
  pybind11::str is_neg_name_{"is_neg"};
};

// Adds TorchInterface to a module.
void register_torch(pybind11::module_& m);

}  // namespace gradloc
