// Fibers: functions with a stack of their own that hand the processor to each other. They know
// nothing of CUDA; block.cpp makes one for each thread of a block.
//
// On x86-64 the switch is ten instructions of assembly: swapcontext, used elsewhere, saves the
// signal mask by a system call at each switch. EMULATOR_UCONTEXT asks for swapcontext everywhere.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY 1
#else
#define EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
  char* stack = nullptr;  // lowest byte; a page that can't be touched lies below
  size_t stack_bytes = 0;
  char* image = nullptr;   // where place_image puts it; frames lie below
  bool abandoned = false;  // it was left in the middle and is not switched to again
  void* asan_state = nullptr;
#if EMULATOR_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// What a fiber does: it calls `function(argument)`, then `ended`, which must not return.
// image: what lies on the stack where `function` expects a parameter that is passed in memory, as
// the calling convention has it for a large struct; it is put there once, by place_image, and
// serves many starts, where a call in C++ would copy it for each. Only where can_place_images.
struct Start {
  void (*function)(const void* argument);
  const void* argument;
  void (*ended)();
};

inline constexpr bool can_place_images = EMULATOR_ASSEMBLY;
inline constexpr size_t kImageBytes = 32768;

// A stack, which stays until the process ends.
void allocate_stack(Fiber& fiber);
void place_image(Fiber& fiber, const void* image, size_t bytes);
// Whether the image is still what was placed: a kernel's parameters are constant.
bool image_is(const Fiber& fiber, const void* image, size_t bytes);

// Makes the fiber begin anew when it is switched to; whatever it was doing is forgotten.
void prepare(Fiber& fiber, const Start& start);

// `from` must be what runs now; it goes on when something switches back to it, never if `ends`.
void switch_fiber(Fiber& from, Fiber& to, bool ends);

}  // namespace emulator
