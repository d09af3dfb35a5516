// A loop over chunks on several threads. The order in which chunks run never shows in a result.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gradloc::cpu {

// Calls body(i) for i in [0, count). Chunks are handed out as threads get free: a thread that the
// system delays holds up no more than one chunk.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
#ifdef _OPENMP
  if (num_threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)num_threads;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace gradloc::cpu
