// Which of the compiled instruction sets runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace gradloc::cpu {

// Names of the instruction sets that this build has and this processor runs, best first.
std::vector<std::string> available_simd();

// The table in use: the best available one unless select_simd chose another.
const KernelTable& kernels();

// Forces an instruction set ("auto" for the best). Throws std::invalid_argument for one that is not
// available. For tests and measurements; not to be called while another thread computes.
void select_simd(const std::string& name);

}  // namespace gradloc::cpu
