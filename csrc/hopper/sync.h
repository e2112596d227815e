// Meeting points other than mbarriers: the block, parts of it, the cluster; and what goes with warp roles.
#pragma once

#include "hopper/device.h"

namespace magihuman {

HOPPER_INLINE void block_sync() {
#if defined(MAGIHUMAN_SIM)
    sim::block_sync();
#else
    __syncthreads();
#endif
}

// Named barriers 1..15 (0 is block_sync's) between `threads` threads, a multiple of 32. Those that sync wait;
// those that arrive go on at once. The last arrival frees the waiters and the barrier is ready for its next
// use.
HOPPER_INLINE void named_barrier_sync(uint32_t id, uint32_t threads) {
#if defined(MAGIHUMAN_SIM)
    sim::named_barrier_sync(id, threads);
#else
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

HOPPER_INLINE void named_barrier_arrive(uint32_t id, uint32_t threads) {
#if defined(MAGIHUMAN_SIM)
    sim::named_barrier_arrive(id, threads);
#else
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Orders this thread's ordinary shared-memory writes before later reads by TMA stores and WGMMA. Every
// writing thread runs it, and then meets the issuing thread at a barrier.
HOPPER_INLINE void fence_proxy_async() {
#if defined(MAGIHUMAN_SIM)
    sim::fence_proxy_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

HOPPER_INLINE uint32_t cluster_rank() {
#if defined(MAGIHUMAN_SIM)
    return sim::cluster_rank();
#else
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

HOPPER_INLINE uint32_t cluster_size() {
#if defined(MAGIHUMAN_SIM)
    return sim::cluster_size();
#else
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#endif
}

// All threads of all blocks of the cluster. The arrival publishes nothing: one that did (.release) would become a
// MEMBAR.ALL.GPU of every thread. It is for the start of a kernel, where fence_mbarrier_init has published the
// barriers and there is nothing else.
//
// At the end it would not do: a block must not end while others may still write to its shared memory or arrive at its
// barriers, and a relaxed arrival may overtake those of the same thread at a peer's barriers. Wait for them: whoever
// fills a ring waits once more for every stage to be free.
HOPPER_INLINE void cluster_arrive_relaxed() {
#if defined(MAGIHUMAN_SIM)
    sim::cluster_arrive_relaxed();
#else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

HOPPER_INLINE void cluster_wait() {
#if defined(MAGIHUMAN_SIM)
    sim::cluster_wait();
#else
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

HOPPER_INLINE void cluster_sync_relaxed() {
    cluster_arrive_relaxed();
    cluster_wait();
}

// True in exactly one lane of a converged warp; which one is the hardware's choice.
HOPPER_INLINE bool elect_one() {
#if defined(MAGIHUMAN_SIM)
    return sim::elect_one();
#else
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
#endif
}

// Moves registers between the roles of a block; every warp of the warpgroup runs it, at the top of its role's
// branch. kCount is a multiple of 8 in 24..256. Takes effect only under __launch_bounds__(threads, 1).
template <uint32_t kCount>
HOPPER_INLINE void registers_release() {
    static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
#if defined(MAGIHUMAN_SIM)
    sim::set_max_registers(kCount, false);
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <uint32_t kCount>
HOPPER_INLINE void registers_claim() {
    static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
#if defined(MAGIHUMAN_SIM)
    sim::set_max_registers(kCount, true);
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace magihuman
