// mbarrier: the arrival counters in shared memory that TMA copies and warp roles meet on.
//
// A barrier counts `count` arrivals and any number of expected bytes; when both are used up its phase ends
// and the next begins. mbarrier_wait(barrier, parity) returns once the phase of that parity has ended: a
// consumer of a fresh ring waits with 0, 1, 0, ..; a producer waiting for free slots starts with 1, which
// passes at once.
#pragma once

#include "hopper/device.h"

namespace magihuman {

struct alignas(8) Barrier {
    uint64_t state;
};

// By one thread, before fence_mbarrier_init and block_sync or cluster_sync_relaxed. `name` and `index` appear in
// the simulator's messages only.
HOPPER_INLINE void mbarrier_init(Barrier* barrier, uint32_t count,
                                 [[maybe_unused]] const char* name = "mbarrier",
                                 [[maybe_unused]] int index = -1) {
#if defined(MAGIHUMAN_SIM)
    sim::mbarrier_init(barrier, count, name, index);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
                 : "memory");
#endif
}

// Makes initialised barriers visible to the async proxy and, with the barrier that follows, to all threads of the
// cluster.
HOPPER_INLINE void fence_mbarrier_init() {
#if defined(MAGIHUMAN_SIM)
    sim::fence_mbarrier_init();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

HOPPER_INLINE void mbarrier_arrive(Barrier* barrier) {
#if defined(MAGIHUMAN_SIM)
    sim::mbarrier_arrive(barrier);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives at the same barrier of the block with rank `block_rank` in this cluster (its own rank included).
// It says "I have read this" and publishes no writes. The form with .release.cluster would, and the compiler
// then puts a MEMBAR.ALL.GPU before each arrival, a stall in every stage; CUTLASS uses this plain form for
// the same purpose.
HOPPER_INLINE void mbarrier_arrive_cluster(Barrier* barrier, uint32_t block_rank) {
#if defined(MAGIHUMAN_SIM)
    sim::mbarrier_arrive_cluster(barrier, block_rank);
#else
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(block_rank)
        : "memory");
#endif
}

// One arrival that also announces `bytes` of copies to come in this phase.
HOPPER_INLINE void mbarrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
#if defined(MAGIHUMAN_SIM)
    sim::mbarrier_arrive_expect_tx(barrier, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
}

// Has the phase of this parity ended? May suspend the thread for a moment. Follow a false with mbarrier_wait.
HOPPER_INLINE bool mbarrier_try_wait(Barrier* barrier, uint32_t parity) {
#if defined(MAGIHUMAN_SIM)
    return sim::mbarrier_try_wait(barrier, parity);
#else
    uint32_t ended;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return ended != 0;
#endif
}

HOPPER_INLINE void mbarrier_wait(Barrier* barrier, uint32_t parity) {
#if defined(MAGIHUMAN_SIM)
    sim::mbarrier_wait(barrier, parity);
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

}  // namespace magihuman
