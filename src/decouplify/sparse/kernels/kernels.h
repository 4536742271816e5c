// The compiled instruction sets, and the choice between them.
#pragma once

#include "convolution.h"

namespace decouplify {

// The fastest this CPU can run.
const Kernels* best_kernels();
// One of the others; null if it was not compiled or this CPU cannot run it.
const Kernels* kernels_named(const char* name);

}  // namespace decouplify
