// Stacks and the switch between them, with what AddressSanitizer must be told about both.
#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;  // frames are larger, with gaps between variables
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

Fiber* switched_from = nullptr;

void before_switch(Fiber& from, const Fiber& to, bool ends) {
  switched_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_state, to.stack, to.stack_bytes);
#else
  (void)to;
  (void)ends;
#endif
}

// Frames that nobody returned from have left their marks in AddressSanitizer's shadow memory.
void forget_frames(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kDeepest = 4096;  // of what runs after a kernel's end; more only after an error
  const size_t bytes = fiber.abandoned ? kStackBytes : kDeepest;
  __asan_unpoison_memory_region(fiber.image - bytes, bytes);
#endif
  fiber.abandoned = false;
}

// The stack that was left is told too: that is how the one that the process began with is learned.
void after_switch(Fiber* resumed) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(resumed ? resumed->asan_state : nullptr, &stack,
                                  &switched_from->stack_bytes);
  switched_from->stack = static_cast<char*>(const_cast<void*>(stack));
#else
  (void)resumed;
#endif
}

}  // namespace

void allocate_stack(Fiber& fiber) {
  static size_t count = 0;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = kStackBytes + kImageBytes + page;
  void* memory = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.stack_bytes = bytes;
  // Stacks that began at the same place of a page would fight for the same few lines of the cache.
  const size_t shift = count++ * 320 % page;
  fiber.image = fiber.stack + bytes - kImageBytes - shift;
}

void place_image(Fiber& fiber, const void* image, size_t bytes) {
  std::memcpy(fiber.image, image, bytes);
}

bool image_is(const Fiber& fiber, const void* image, size_t bytes) {
  return std::memcmp(fiber.image, image, bytes) == 0;
}

#if EMULATOR_ASSEMBLY

extern "C" {
void emulator_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));
void emulator_start_fiber() __attribute__((visibility("hidden")));
__attribute__((used, visibility("hidden"))) void emulator_fiber_began() { after_switch(nullptr); }
}

// The registers that a called function must keep are on the stack of who waits; a fiber that has
// not begun has its Start there: r12 the function, r13 its argument, r14 what comes afterwards.
asm(R"(
.text
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack

.hidden emulator_start_fiber
.globl emulator_start_fiber
.type emulator_start_fiber, @function
emulator_start_fiber:
  call emulator_fiber_began
  movq %r13, %rdi
  call *%r12
  call *%r14
  ud2
.size emulator_start_fiber, .-emulator_start_fiber
)");

void prepare(Fiber& fiber, const Start& start) {
  forget_frames(fiber);
  // What emulator_switch_stack pops: r15, r14, r13, r12, rbx, rbp, and where it returns to. Above
  // it is the image, so that the call of the function finds it as its parameter in memory.
  auto* top = reinterpret_cast<uintptr_t*>(fiber.image) - 7;
  top[0] = 0;
  top[1] = reinterpret_cast<uintptr_t>(start.ended);
  top[2] = reinterpret_cast<uintptr_t>(start.argument);
  top[3] = reinterpret_cast<uintptr_t>(start.function);
  top[4] = 0;
  top[5] = 0;  // no frame above: a stack trace ends here
  top[6] = reinterpret_cast<uintptr_t>(&emulator_start_fiber);
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
  before_switch(from, to, ends);
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
  after_switch(&from);
}

#else

namespace {

// makecontext passes nothing but int, so that what a new fiber starts with waits in its own stack.
Fiber* beginning = nullptr;

void start_fiber() {
  const Start start = *reinterpret_cast<Start*>(beginning->image);
  after_switch(nullptr);
  start.function(start.argument);
  start.ended();
}

}  // namespace

void prepare(Fiber& fiber, const Start& start) {
  forget_frames(fiber);
  std::memcpy(fiber.image, &start, sizeof(start));
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(fiber.image - fiber.stack);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
}

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
  before_switch(from, to, ends);
  beginning = &to;
  swapcontext(&from.context, &to.context);
  after_switch(&from);
}

#endif

}  // namespace emulator
