// The one description of the work that every backend walks: a list of tensors cut into fixed-size
// chunks, each with its tensor, offset and layer. Says nothing about what is done to a chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "host_device.h"

namespace gradloc {

// Elements of a chunk. Fixed: the chunk is the unit of the deterministic reduction, so another size
// gives other (equally right) last bits. docs/decisions/0002-chunks-and-determinism.md says why
// 32,768.
inline constexpr int64_t kChunkElements = 32768;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
inline constexpr int32_t kNumDTypes = 3;

GRADLOC_HOST_DEVICE inline constexpr int64_t dtype_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

struct Chunk {
  int64_t offset;  // first element, counted in the tensor
  int32_t size;    // elements, 1 to kChunkElements
  int32_t tensor;  // index into the tensor list
  int32_t layer;   // index of the layer that the tensor belongs to
};

// Chunks in tensor order, then by offset. Empty tensors have none.
// sizes: elements of each tensor; layers: layer index of each tensor, same length.
inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& sizes,
                                      const std::vector<int32_t>& layers) {
  std::vector<Chunk> chunks;
  for (size_t tensor = 0; tensor < sizes.size(); ++tensor) {
    for (int64_t offset = 0; offset < sizes[tensor]; offset += kChunkElements) {
      const int64_t left = sizes[tensor] - offset;
      chunks.push_back({offset, static_cast<int32_t>(left < kChunkElements ? left : kChunkElements),
                        static_cast<int32_t>(tensor), layers[tensor]});
    }
  }
  return chunks;
}

}  // namespace gradloc
