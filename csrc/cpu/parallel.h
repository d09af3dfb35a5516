// A loop over chunks on several threads. The order in which chunks run never shows in a result.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gradloc::cpu {

// Calls body(i) for i in [0, count). Chunks are handed out in short runs as threads get free: in
// runs, because the processor's prefetchers like neighbours; as threads get free, so that one that
// the system delays holds up no more than its run.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
#ifdef _OPENMP
  if (num_threads > 1 && count > 1) {
    const int64_t sixteenth = count / (16 * static_cast<int64_t>(num_threads));
    const int run = static_cast<int>(sixteenth < 1 ? 1 : sixteenth > 32 ? 32 : sixteenth);
#pragma omp parallel for schedule(dynamic, run) num_threads(num_threads)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)num_threads;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace gradloc::cpu
