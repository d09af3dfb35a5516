// Reads where a torch tensor lies and how it is laid out, without torch's headers: through torch's
// C interface (the aoti_torch_* functions), whose addresses gradloc/watch.py looks up. Does not
// decide what is done with a tensor, and does not know Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "chunks.h"

namespace gradloc {

// torch's AtenTensorHandle: the address of an at::Tensor, which is one pointer to its TensorImpl.
using TensorHandle = const void*;

// Each function returns 0, or prints what is wrong and returns another value; so nothing is asked
// that a tensor cannot answer (a sparse one has no address).
struct TorchFunctions {
  int32_t (*get_layout)(TensorHandle, int32_t*);
  int32_t (*get_device_type)(TensorHandle, int32_t*);
  int32_t (*get_device_index)(TensorHandle, int32_t*);
  int32_t (*get_dtype)(TensorHandle, int32_t*);
  int32_t (*get_dim)(TensorHandle, int64_t*);
  int32_t (*get_sizes)(TensorHandle, int64_t**);
  int32_t (*get_strides)(TensorHandle, int64_t**);
  int32_t (*get_data_ptr)(TensorHandle, void**);
  int32_t (*is_defined)(TensorHandle, bool*);
  int32_t (*new_handle)(void**);           // to an undefined tensor
  int32_t (*assign)(TensorHandle, void*);  // the second handle owns the first one's tensor too
  int32_t (*delete_handle)(void*);
  // What the C interface does not have, by its C++ name; null where that is not known.
  bool (*is_neg)(TensorHandle);
  TensorHandle (*grad)(const void*);  // of a TensorImpl; undefined when it has none

  // torch's numbers for what we ask about.
  int32_t strided;
  int32_t cpu;
  int32_t cuda;
  int32_t dtypes[kNumDTypes];  // by DType
};

// A strided tensor on the CPU or a CUDA device. `sizes` and `strides` belong to the tensor.
struct TensorView {
  const void* data;
  const int64_t* sizes;    // [dim]
  const int64_t* strides;  // [dim] in elements
  int64_t dim;
  int32_t dtype;  // torch's number
  int32_t device_type;
  int32_t device_index;
};

// False for a tensor that is not strided or lies on another kind of device.
inline bool read_tensor(const TorchFunctions& torch, TensorHandle tensor, TensorView& view) {
  int32_t layout = -1;
  if (torch.get_layout(tensor, &layout) != 0 || layout != torch.strided) return false;
  if (torch.get_device_type(tensor, &view.device_type) != 0) return false;
  if (view.device_type != torch.cpu && view.device_type != torch.cuda) return false;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  void* data = nullptr;
  const bool read = torch.get_device_index(tensor, &view.device_index) == 0 &&
                    torch.get_dtype(tensor, &view.dtype) == 0 &&
                    torch.get_dim(tensor, &view.dim) == 0 && torch.get_sizes(tensor, &sizes) == 0 &&
                    torch.get_strides(tensor, &strides) == 0 &&
                    torch.get_data_ptr(tensor, &data) == 0;
  view.sizes = sizes;
  view.strides = strides;
  view.data = data;
  return read;
}

// Our code for torch's dtype number; false when the core cannot compute with it.
inline bool core_dtype(const TorchFunctions& torch, int32_t torch_dtype, DType& dtype) {
  for (int32_t code = 0; code < kNumDTypes; ++code) {
    if (torch.dtypes[code] == torch_dtype) {
      dtype = static_cast<DType>(code);
      return true;
    }
  }
  return false;
}

// Keeps tensors alive. Its handles are made once and used again: in a heap that a backward pass has
// left in pieces, making them takes longer than all the rest.
class TensorOwners {
 public:
  TensorOwners(const TorchFunctions& torch, size_t capacity) : torch_(torch) {
    handles_.reserve(capacity);
    for (size_t i = 0; i <= capacity; ++i) {
      void* handle = nullptr;
      if (torch_.new_handle(&handle) != 0) throw std::bad_alloc();
      (i == 0 ? undefined_ : handles_.emplace_back()) = handle;
    }
  }
  TensorOwners(const TensorOwners&) = delete;
  TensorOwners& operator=(const TensorOwners&) = delete;
  ~TensorOwners() {
    for (void* handle : handles_) torch_.delete_handle(handle);
    torch_.delete_handle(undefined_);
  }

  // At most `capacity` until the next release.
  void own(TensorHandle tensor) { torch_.assign(tensor, handles_[num_owned_++]); }

  void release() {
    while (num_owned_ > 0) torch_.assign(undefined_, handles_[--num_owned_]);
  }

 private:
  TorchFunctions torch_;
  void* undefined_ = nullptr;
  std::vector<void*> handles_;
  size_t num_owned_ = 0;
};

// What is remembered of a tensor, to be compared with what it is later.
class TensorRecord {
 public:
  explicit TensorRecord(const TensorView& now)
      : data_(now.data),
        dim_(now.dim),
        dtype_(now.dtype),
        device_type_(now.device_type),
        device_index_(now.device_index),
        contiguous_(is_contiguous(now)) {
    sizes_.assign(now.sizes, now.sizes + now.dim);
    strides_.assign(now.strides, now.strides + now.dim);
    for (int64_t size : sizes_) numel_ *= size;
  }

  int64_t numel() const { return numel_; }

  bool same_device(const TensorView& now) const {
    return now.device_type == device_type_ && now.device_index == device_index_;
  }

  bool same_shape(const TensorView& now) const {
    return now.dim == dim_ && std::equal(sizes_.begin(), sizes_.end(), now.sizes);
  }

  // Whether it is still that memory, seen in that way.
  bool is(const TensorView& now) const {
    return now.data == data_ && now.dtype == dtype_ && same_device(now) && same_shape(now) &&
           same_strides(now);
  }

  // Whether its elements follow each other as in the remembered tensor, which has its shape.
  bool same_order(const TensorView& now) const {
    return same_strides(now) || (contiguous_ && is_contiguous(now));
  }

 private:
  bool same_strides(const TensorView& now) const {
    return std::equal(strides_.begin(), strides_.end(), now.strides);
  }

  // In row-major order without gaps; the strides of dimensions of size 1 do not count.
  static bool is_contiguous(const TensorView& now) {
    int64_t expected = 1;
    bool dense = true;
    for (int64_t i = now.dim - 1; i >= 0; --i) {
      if (now.sizes[i] == 0) return true;
      dense = dense && (now.sizes[i] == 1 || now.strides[i] == expected);
      expected *= now.sizes[i];
    }
    return dense;
  }

  const void* data_;
  int64_t dim_;
  int64_t numel_ = 1;
  int32_t dtype_;
  int32_t device_type_;
  int32_t device_index_;
  bool contiguous_;
  std::vector<int64_t> sizes_;    // [dim]
  std::vector<int64_t> strides_;  // [dim]
};

}  // namespace gradloc
