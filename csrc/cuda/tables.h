// The tables that kernels read (params.h), made on the host for a list of tensors: how many bytes
// they take, their contents, and the addresses of their parts once they lie in device memory.
// Copies nothing to a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"

namespace gradloc::cuda {

class HostTables {
 public:
  // sizes: elements of each tensor; layers: layer index of each. Throws std::invalid_argument when
  // they don't fit together.
  HostTables(const std::vector<int64_t>& sizes, const std::vector<int32_t>& layers,
             int32_t num_layers);

  size_t num_tensors() const { return num_tensors_; }
  int32_t num_layers() const { return static_cast<int32_t>(layer_segments_.size()) - 1; }
  size_t table_bytes() const { return layout().end; }
  size_t scratch_bytes() const { return scratch_layout().end; }

  // Writes the tables into table_bytes() bytes of host memory, to be copied as they are.
  // grad_dtypes: [num_tensors]; tensors: [num_tensors] or empty; scales: [num_layers] or empty.
  void write(char* out, const std::vector<DType>& grad_dtypes,
             const std::vector<TensorEntry>& tensors, const std::vector<double>& scales) const;

  // base: device memory of table_bytes(), a multiple of 16.
  Tables at(char* base) const;
  // base: device memory of scratch_bytes(), a multiple of 16, zeros before its first use.
  Scratch scratch_at(char* base) const;

 private:
  struct Layout {
    size_t chunks, segments, layer_segments, grad_dtypes, tensors, scales, end;
  };
  struct ScratchLayout {
    size_t chunk_sums, segment_sums, segment_counters, counter, end;
  };
  Layout layout() const;
  ScratchLayout scratch_layout() const;

  size_t num_tensors_;
  std::vector<ChunkEntry> chunks_;
  std::vector<SegmentEntry> segments_;
  std::vector<int32_t> layer_segments_;
};

}  // namespace gradloc::cuda
