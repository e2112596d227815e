#include "sim/fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .globl magihuman_fibre_switch
    .type magihuman_fibre_switch, @function
magihuman_fibre_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size magihuman_fibre_switch, .-magihuman_fibre_switch
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
    .globl magihuman_fibre_switch
    .type magihuman_fibre_switch, @function
magihuman_fibre_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    ldr x9, [x1]
    mov sp, x9
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size magihuman_fibre_switch, .-magihuman_fibre_switch
)");
#endif

#if !defined(MAGIHUMAN_SIM_UCONTEXT)
extern "C" void magihuman_fibre_switch(void** from_stack_pointer, void** to_stack_pointer);
#endif

namespace magihuman::sim {

#if defined(MAGIHUMAN_SIM_UCONTEXT)

void fibre_prepare(FibreContext& fibre, void* stack, size_t bytes, void (*entry)()) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stack;
    fibre.context.uc_stack.ss_size = bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, entry, 0);
}

void fibre_switch(FibreContext& from, FibreContext& to) { swapcontext(&from.context, &to.context); }

#else

void fibre_prepare(FibreContext& fibre, void* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
#if defined(__x86_64__)
    // As if the switch had been called from a function about to call `entry`: six saved registers, then the
    // address that its return goes to, then the slot of the return address that entry never uses.
    constexpr int kWords = 8, kEntry = 6;
#else
    constexpr int kWords = 20, kEntry = 11;  // the slot of x30
#endif
    top -= kWords;
    for (int i = 0; i < kWords; ++i) top[i] = 0;
    top[kEntry] = reinterpret_cast<uint64_t>(entry);
    fibre.stack_pointer = top;
}

void fibre_switch(FibreContext& from, FibreContext& to) {
    magihuman_fibre_switch(&from.stack_pointer, &to.stack_pointer);
}

#endif

void* fibre_stack(size_t index) {
    static std::vector<uint8_t*> stacks;
    constexpr size_t kGuard = 4096;
    while (stacks.size() <= index) {
        void* region = mmap(nullptr, kFibreStackBytes + kGuard, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (region == MAP_FAILED) throw std::bad_alloc();
        mprotect(region, kGuard, PROT_NONE);
        stacks.push_back(static_cast<uint8_t*>(region) + kGuard);
    }
    return stacks[index];
}

}  // namespace magihuman::sim
