// Marks functions that the host and, under a CUDA compiler, the device both run. Nothing else.
#pragma once

#ifdef __CUDACC__
#define GRADLOC_HOST_DEVICE __host__ __device__
#else
#define GRADLOC_HOST_DEVICE
#endif
