// Notices between two steps of an optimizer whether a tensor of it was exchanged, and collects the
// gradients, without running Python code for each tensor. Says only yes, no, or None for "ask the
// Python code": what is wrong with a gradient, and what to do then, is for gradloc/optim_work.py.
#include "watch_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "gradients_bindings.h"
#include "torch_bindings.h"
#include "torch_tensor.h"

namespace py = pybind11;

namespace gradloc {
namespace {

// Two ways to go over an optimizer: writing down what is met, and comparing with what was written.
// Both see objects, whose identity counts, and words.
class Recorder {
 public:
  std::vector<py::object> objects;  // held: a freed object's address may come back as another's
  std::vector<uintptr_t> words;

  bool object(PyObject* now) {
    objects.push_back(py::reinterpret_borrow<py::object>(now));
    return true;
  }
  // What costs too much to be asked again: it holds as long as all else does.
  template <class Ask>
  bool answer(Ask ask) {
    words.push_back(ask() ? 1 : 0);
    return words.back() != 0;
  }
  bool word(uintptr_t now) {
    words.push_back(now);
    return true;
  }
  bool ends() const { return true; }
};

class Comparer {
 public:
  explicit Comparer(const Recorder& before)
      : object_(before.objects.data()),
        objects_end_(object_ + before.objects.size()),
        word_(before.words.data()),
        words_end_(word_ + before.words.size()) {}

  bool object(PyObject* now) { return object_ != objects_end_ && (object_++)->ptr() == now; }
  template <class Ask>
  bool answer(const Ask&) {
    return word_ != words_end_ && *word_++ != 0;
  }
  bool word(uintptr_t now) { return word_ != words_end_ && *word_++ == now; }
  bool ends() const { return object_ == objects_end_ && word_ == words_end_; }

 private:
  const py::object* object_;
  const py::object* objects_end_;
  const uintptr_t* word_;
  const uintptr_t* words_end_;
};

// Tensors that are kept alive until this goes.
struct Lease {
  std::shared_ptr<TensorOwners> owners;

  Lease() = default;
  Lease(Lease&&) = default;
  ~Lease() {
    if (owners != nullptr) owners->release();
  }
};

py::object in_capsule(Lease lease) {
  auto held = std::make_unique<Lease>(std::move(lease));
  py::capsule capsule(held.get(), [](void* lease) { delete static_cast<Lease*>(lease); });
  held.release();
  return std::move(capsule);
}

class TensorWatch {
 public:
  TensorWatch(py::object interface, py::object groups, py::object states, const py::object& active,
              std::vector<int32_t> layers)
      : interface_object_(std::move(interface)),
        interface_(interface_object_.cast<const TorchInterface*>()),
        groups_(std::move(groups)),
        states_(std::move(states)),
        layers_(std::move(layers)) {
    if (!py::isinstance<py::list>(groups_) || !py::isinstance<py::dict>(states_)) {
      throw py::type_error("groups is a list, states a dict");
    }
    for (py::handle param : active) {
      active_.push_back(py::reinterpret_borrow<py::object>(param));
      if (interface_->is_plain(param.ptr())) is_active_.insert(param.ptr());
    }
    if (layers_.size() != active_.size()) {
      throw std::invalid_argument("layers has " + std::to_string(layers_.size()) +
                                  " entries, expected " + std::to_string(active_.size()));
    }
    int32_t num_layers = 0;
    for (int32_t layer : layers_) {
      if (layer < 0) throw std::invalid_argument("layer=" + std::to_string(layer) + " is negative");
      if (layer >= num_layers) num_layers = layer + 1;
    }
    has_grad_.resize(num_layers);
    keys_ = {py::str("params"), py::str("amsgrad"), py::str("fused")};
  }

  bool remember(const std::vector<std::vector<size_t>>& parts) {
    forget();
    slots_.assign(active_.size(), {-1, 0});
    part_sizes_.clear();
    owners_.assign(parts.size(), nullptr);
    for (size_t part = 0; part < parts.size(); ++part) {
      part_sizes_.push_back(parts[part].size());
      for (size_t i = 0; i < parts[part].size(); ++i) {
        const size_t member = parts[part][i];
        if (member >= active_.size() || slots_[member].part >= 0) {
          throw std::invalid_argument("member " + std::to_string(member) +
                                      " is in two parts, or is no active parameter");
        }
        slots_[member] = {static_cast<int32_t>(part), i};
      }
    }
    known_ = record_params() && walk(before_);
    if (!known_) forget();
    return known_;
  }

  bool unchanged() const {
    if (!known_) return false;
    Comparer comparer(before_);
    if (!walk(comparer) || !comparer.ends()) return false;
    for (size_t i = 0; i < active_.size(); ++i) {
      TensorView view;
      if (!read(active_[i].ptr(), view) || !records_[i].is(view) ||
          interface_->is_neg(interface_->handle(active_[i].ptr()))) {
        return false;
      }
    }
    return true;
  }

  // A list with the gradients of each part, or None when Python has to look at one of them.
  py::object gradients() {
    if (!known_) return py::none();
    std::vector<PyGradients> found(part_sizes_.size());
    // Gives the tensors back when the gradients go, and also when there is nothing to return.
    std::vector<Lease> owned(found.size());
    for (size_t part = 0; part < found.size(); ++part) {
      found[part].list.data.assign(part_sizes_[part], nullptr);
      found[part].list.dtypes.assign(part_sizes_[part], DType::kFloat32);
      // Another one only while somebody keeps the gradients of an earlier call.
      if (owners_[part] == nullptr || owners_[part].use_count() > 1) {
        owners_[part] = std::make_shared<TensorOwners>(interface_->torch(), part_sizes_[part]);
      }
      owned[part].owners = owners_[part];
    }
    std::vector<char> has_grad(has_grad_.size(), 0);
    for (size_t i = 0; i < active_.size(); ++i) {
      py::object made;
      TensorHandle grad = nullptr;
      if (!interface_->grad(active_[i].ptr(), made, grad)) return py::none();
      if (grad == nullptr) continue;
      // A parameter without state gets it when its first gradient comes.
      if (slots_[i].part < 0) return py::none();
      PyGradients& part = found[slots_[i].part];
      if (!take(records_[i], grad, part.list.data[slots_[i].position],
                part.list.dtypes[slots_[i].position])) {
        return py::none();
      }
      owned[slots_[i].part].owners->own(grad);
      has_grad[layers_[i]] = 1;
    }
    name_layers(std::move(has_grad));
    py::list out;
    for (size_t part = 0; part < found.size(); ++part) {
      found[part].kept.push_back(in_capsule(std::move(owned[part])));
      out.append(py::cast(std::move(found[part])));
    }
    return out;
  }

  py::frozenset layers_with_grad() const { return layers_with_grad_; }

  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(interface_object_.ptr());
    Py_VISIT(groups_.ptr());
    Py_VISIT(states_.ptr());
    for (const py::object& param : active_) Py_VISIT(param.ptr());
    for (const py::object& object : before_.objects) Py_VISIT(object.ptr());
    return 0;
  }

  void clear() {
    // Moved out first: what is freed may run code that asks this object.
    const std::vector<py::object> active = std::move(active_);
    const py::object groups = std::exchange(groups_, py::object());
    const py::object states = std::exchange(states_, py::object());
    active_.clear();
    forget();
  }

 private:
  struct Slot {
    int32_t part;  // -1: in none
    size_t position;
  };

  void forget() {
    known_ = false;
    const Recorder before = std::exchange(before_, Recorder());
  }

  // Of tensors that are plain.
  bool read(PyObject* tensor, TensorView& view) const {
    return read_tensor(interface_->torch(), interface_->handle(tensor), view);
  }
  uintptr_t address(PyObject* tensor) const {
    void* data = nullptr;
    interface_->torch().get_data_ptr(interface_->handle(tensor), &data);
    return reinterpret_cast<uintptr_t>(data);
  }

  bool record_params() {
    records_.clear();
    for (const py::object& param : active_) {
      TensorView view;
      DType dtype;
      if (!interface_->is_plain(param.ptr()) || !read(param.ptr(), view) ||
          interface_->is_neg(interface_->handle(param.ptr())) ||
          !core_dtype(interface_->torch(), view.dtype, dtype)) {
        return false;
      }
      records_.emplace_back(view);
    }
    return true;
  }

  // Groups and state, in the order in which they stand. Nothing in here runs Python code, so that
  // dicts cannot change while they are gone over.
  template <class Walker>
  bool walk(Walker& walker) const {
    if (!groups_ || !states_) return false;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups_.ptr()); ++g) {
      PyObject* group = PyList_GET_ITEM(groups_.ptr(), g);
      if (!PyDict_Check(group) || !walker.object(group)) return false;
      for (const py::object& key : keys_) {
        PyObject* value = PyDict_GetItemWithError(group, key.ptr());
        if (value == nullptr || !walker.object(value)) return false;
      }
      PyObject* params = PyDict_GetItemWithError(group, keys_[0].ptr());
      if (!PyList_Check(params)) return false;
      for (Py_ssize_t p = 0; p < PyList_GET_SIZE(params); ++p) {
        if (!walker.object(PyList_GET_ITEM(params, p))) return false;
      }
    }
    PyObject* param;
    PyObject* state;
    Py_ssize_t at = 0;
    while (PyDict_Next(states_.ptr(), &at, &param, &state) != 0) {
      if (!walker.object(param) || !walker.object(state)) return false;
      const bool active = walker.answer([&] { return is_active_.count(param) != 0; });
      if (active && !walk_state(state, walker)) return false;
    }
    return true;
  }

  template <class Walker>
  bool walk_state(PyObject* state, Walker& walker) const {
    if (!PyDict_Check(state)) return false;
    PyObject* key;
    PyObject* value;
    Py_ssize_t at = 0;
    while (PyDict_Next(state, &at, &key, &value) != 0) {
      if (!walker.object(key) || !walker.object(value)) return false;
      if (interface_->is_plain(value)) {
        // Addresses too: a tensor may get other memory in place (share_memory_, .data).
        const bool readable = walker.answer([&] {
          TensorView view;
          return read(value, view);
        });
        if (!readable || !walker.word(address(value))) return false;
      }
    }
    return true;
  }

  // Address and dtype of an ordinary gradient of the parameter that was recorded.
  bool take(const TensorRecord& param, TensorHandle grad, const void*& data, DType& dtype) const {
    TensorView view;
    if (!read_tensor(interface_->torch(), grad, view)) return false;
    if (!core_dtype(interface_->torch(), view.dtype, dtype)) return false;
    if (!param.same_device(view) || !param.same_shape(view) || !param.same_order(view)) {
      return false;
    }
    if (view.data == nullptr && param.numel() != 0) return false;  // zeros that never got memory
    if (interface_->is_neg(grad)) return false;
    // Empty tensors have no address, and no chunks: any but null, which says "no gradient".
    data = view.data != nullptr ? view.data : reinterpret_cast<const void*>(uintptr_t{1});
    return true;
  }

  void name_layers(std::vector<char> has_grad) {
    if (layers_with_grad_ && has_grad == has_grad_) return;
    py::set layers;
    for (size_t layer = 0; layer < has_grad.size(); ++layer) {
      if (has_grad[layer] != 0) layers.add(layer);
    }
    layers_with_grad_ = py::frozenset(layers);
    has_grad_ = std::move(has_grad);
  }

  py::object interface_object_;
  const TorchInterface* interface_;
  py::object groups_;                        // a list
  py::object states_;                        // a dict
  std::vector<py::object> active_;           // [active]
  std::vector<int32_t> layers_;              // [active]
  std::unordered_set<PyObject*> is_active_;  // those of `active_` that are plain
  std::vector<py::object> keys_;
  bool known_ = false;
  Recorder before_;
  std::vector<TensorRecord> records_;  // [active] the parameters
  std::vector<Slot> slots_;            // [active] where its gradient goes
  std::vector<size_t> part_sizes_;
  std::vector<std::shared_ptr<TensorOwners>> owners_;  // [parts]
  std::vector<char> has_grad_;                         // [layers] by the last `gradients`
  py::frozenset layers_with_grad_{py::set()};
};

// The C++ object behind a Python one, or null before its constructor has run.
TensorWatch* watch_of(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  if (!instance->simple_layout || !instance->simple_holder_constructed) return nullptr;
  return static_cast<TensorWatch*>(instance->simple_value_holder[0]);
}

// The optimizer holds the watch, and hooks of its parameters may hold the optimizer: without this
// the garbage collector could not free the three.
void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    const TensorWatch* watch = watch_of(self);
    return watch == nullptr ? 0 : watch->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) -> int {
    if (TensorWatch* watch = watch_of(self)) watch->clear();
    return 0;
  };
}

}  // namespace

void register_watch(py::module_& m) {
  py::class_<TensorWatch>(m, "TensorWatch", py::custom_type_setup(&collect_garbage),
                          "Notices changes between steps, and collects gradients.")
      .def(py::init<py::object, py::object, py::object, const py::object&, std::vector<int32_t>>(),
           py::arg("interface"), py::arg("groups"), py::arg("states"), py::arg("active"),
           py::arg("layers"))
      .def("remember", &TensorWatch::remember, py::arg("parts"),
           "Take the present state as the one to compare with; False when it holds something that "
           "cannot be watched. `parts`: which active parameters' gradients belong together.")
      .def("unchanged", &TensorWatch::unchanged, "Whether all is as it was remembered.")
      .def("gradients", &TensorWatch::gradients,
           "The gradients of each part, or None when Python has to look at them.")
      .def_property_readonly("layers_with_grad", &TensorWatch::layers_with_grad,
                             "Layers of which the last `gradients` found one.");
}

}  // namespace gradloc
