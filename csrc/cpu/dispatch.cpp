// Asks the processor what it runs and keeps the chosen kernel table.
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace gradloc::cpu {
namespace {

std::vector<const KernelTable*> available() {
  std::vector<const KernelTable*> tables;
#ifdef GRADLOC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kKernelsAvx512);
  }
  // Every processor with AVX2 has F16C, which older compilers cannot ask for by name.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kKernelsAvx2);
  }
#endif
  tables.push_back(&kKernelsPlain);
  return tables;
}

std::atomic<const KernelTable*>& selected() {
  static std::atomic<const KernelTable*> table{available().front()};
  return table;
}

}  // namespace

std::vector<std::string> available_simd() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->name);
  return names;
}

const KernelTable& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_simd(const std::string& name) {
  std::string known = "auto";
  for (const KernelTable* table : available()) {
    if (name == "auto" || name == table->name) {
      selected().store(table);
      return;
    }
    known += std::string(", ") + table->name;
  }
  throw std::invalid_argument("simd='" + name + "' is not available here: choose one of " + known);
}

}  // namespace gradloc::cpu
