// Cuts tensors into chunks, sorts these by layer, and groups them into segments.
#include "tables.h"

#include <algorithm>
#include <cstring>

#include "../work.h"

namespace gradloc::cuda {
namespace {

// Places arrays one after the other at multiples of 16 bytes.
class Placer {
 public:
  size_t place(size_t bytes) {
    const size_t here = at_;
    at_ += (bytes + 15) / 16 * 16;
    return here;
  }
  size_t end() const { return at_; }

 private:
  size_t at_ = 0;
};

template <class T>
void put(char* out, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(out, values.data(), values.size() * sizeof(T));
}

}  // namespace

HostTables::HostTables(const std::vector<int64_t>& sizes, const std::vector<int32_t>& layers,
                       int32_t num_layers)
    : num_tensors_(sizes.size()) {
  Work work(sizes, layers, num_layers);  // checks, and cuts
  std::stable_sort(work.chunks.begin(), work.chunks.end(),
                   [](const Chunk& a, const Chunk& b) { return a.layer < b.layer; });
  size_t next = 0;
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    layer_segments_.push_back(static_cast<int32_t>(segments_.size()));
    for (int32_t in_layer = 0; next < work.chunks.size() && work.chunks[next].layer == layer;
         ++next, ++in_layer) {
      if (in_layer % kMaxSegmentChunks == 0) {
        segments_.push_back({static_cast<int32_t>(next), 0});
      }
      ++segments_.back().num_chunks;
      const Chunk& chunk = work.chunks[next];
      const auto segment = static_cast<int32_t>(segments_.size()) - 1;
      chunks_.push_back({chunk.offset, chunk.size, chunk.tensor, segment, 0});
    }
  }
  layer_segments_.push_back(static_cast<int32_t>(segments_.size()));
}

HostTables::Layout HostTables::layout() const {
  Placer placer;
  Layout at;
  at.chunks = placer.place(chunks_.size() * sizeof(ChunkEntry));
  at.segments = placer.place(segments_.size() * sizeof(SegmentEntry));
  at.layer_segments = placer.place(layer_segments_.size() * sizeof(int32_t));
  at.grad_dtypes = placer.place(num_tensors_ * sizeof(DType));
  at.tensors = placer.place(num_tensors_ * sizeof(TensorEntry));
  at.scales = placer.place(static_cast<size_t>(num_layers()) * sizeof(double));
  at.end = placer.end();
  return at;
}

HostTables::ScratchLayout HostTables::scratch_layout() const {
  Placer placer;
  ScratchLayout at;
  at.chunk_sums = placer.place(chunks_.size() * sizeof(double));
  at.segment_sums = placer.place(segments_.size() * sizeof(double));
  at.segment_counters = placer.place(segments_.size() * sizeof(unsigned));
  at.counter = placer.place(sizeof(unsigned));
  at.end = placer.end();
  return at;
}

void HostTables::write(char* out, const std::vector<DType>& grad_dtypes,
                       const std::vector<TensorEntry>& tensors,
                       const std::vector<double>& scales) const {
  const Layout at = layout();
  std::memset(out, 0, at.end);
  put(out + at.chunks, chunks_);
  put(out + at.segments, segments_);
  put(out + at.layer_segments, layer_segments_);
  put(out + at.grad_dtypes, grad_dtypes);
  put(out + at.tensors, tensors);
  put(out + at.scales, scales);
}

Tables HostTables::at(char* base) const {
  const Layout at = layout();
  Tables tables;
  tables.chunks = reinterpret_cast<const ChunkEntry*>(base + at.chunks);
  tables.segments = reinterpret_cast<const SegmentEntry*>(base + at.segments);
  tables.layer_segments = reinterpret_cast<const int32_t*>(base + at.layer_segments);
  tables.grad_dtypes = reinterpret_cast<const DType*>(base + at.grad_dtypes);
  tables.tensors = reinterpret_cast<const TensorEntry*>(base + at.tensors);
  tables.scales = reinterpret_cast<const double*>(base + at.scales);
  tables.num_chunks = static_cast<int32_t>(chunks_.size());
  tables.num_segments = static_cast<int32_t>(segments_.size());
  tables.num_layers = num_layers();
  tables.num_tensors = static_cast<int32_t>(num_tensors_);
  return tables;
}

Scratch HostTables::scratch_at(char* base) const {
  const ScratchLayout at = scratch_layout();
  Scratch scratch;
  scratch.chunk_sums = reinterpret_cast<double*>(base + at.chunk_sums);
  scratch.segment_sums = reinterpret_cast<double*>(base + at.segment_sums);
  scratch.segment_counters = reinterpret_cast<unsigned*>(base + at.segment_counters);
  scratch.counter = reinterpret_cast<unsigned*>(base + at.counter);
  return scratch;
}

}  // namespace gradloc::cuda
