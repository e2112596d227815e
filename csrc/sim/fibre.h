// Fibres: threads of one processor that switch only when told to. A switch saves the registers that a called
// function must preserve; the system's own swapcontext makes a system call each time, fifty times the cost.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(MAGIHUMAN_SIM_UCONTEXT)
#define MAGIHUMAN_SIM_UCONTEXT 1
#endif
#if defined(MAGIHUMAN_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace magihuman::sim {

struct FibreContext {
#if defined(MAGIHUMAN_SIM_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
};

// Readies `fibre` to run `entry` (which must never return) on the given stack.
void fibre_prepare(FibreContext& fibre, void* stack, size_t bytes, void (*entry)());

// Leaves the running fibre, remembered in `from`, for `to`.
void fibre_switch(FibreContext& from, FibreContext& to);

// The stack of fibre number `index`: kept for the life of the process, with a guard page below.
constexpr size_t kFibreStackBytes = 64 * 1024;
void* fibre_stack(size_t index);

}  // namespace magihuman::sim
