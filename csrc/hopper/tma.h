// The copy engine: boxes of a tensor between global and shared memory, asynchronously.
//
// Issued by one thread. Loads announce their bytes on an mbarrier; stores are grouped by tma_store_commit and
// awaited by the issuing thread. Coordinates are element indices, innermost first, 2 to 5 of them, and may be
// negative or beyond the tensor. Shared addresses are multiples of 128 bytes (of swizzle_period under a
// swizzle).
#pragma once

#include "hopper/mbarrier.h"
#include "hopper/tensor_map.h"

namespace magihuman {

// What L2 should do with the lines that a copy touches (the encodings that createpolicy would give).
enum class CacheHint : uint64_t {
    kNormal = 0x1000000000000000,
    kEvictFirst = 0x12F0000000000000,  // read once: activations of a finished tile, streamed outputs
    kEvictLast = 0x14F0000000000000,   // read by every tile: weights that fit
};

// Fetches the 128-byte map itself ahead of the first copy.
HOPPER_INLINE void tma_prefetch_map([[maybe_unused]] const TensorMap* map) {
#if defined(MAGIHUMAN_SIM)
    sim::tma_check_map(map);
#else
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

#if !defined(MAGIHUMAN_SIM)
// One asm statement per rank; the ranks differ only in their coordinate list.
#define HOPPER_TMA_LOAD(RANK, COORDINATES, ...)                                                        \
    asm volatile(                                                                                      \
        "cp.async.bulk.tensor." RANK                                                                   \
        ".shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {" COORDINATES \
        "}], [%2], %3;" ::"r"(to),                                                                     \
        "l"(map), "r"(signal), "l"(hint), __VA_ARGS__                                                  \
        : "memory")
#define HOPPER_TMA_LOAD_MULTICAST(RANK, COORDINATES, ...)                                                 \
    asm volatile("cp.async.bulk.tensor." RANK                                                             \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint" \
                 " [%0], [%1, {" COORDINATES "}], [%2], %3, %4;" ::"r"(to),                               \
                 "l"(map), "r"(signal), "h"(block_mask), "l"(hint), __VA_ARGS__                           \
                 : "memory")
#define HOPPER_TMA_STORE(RANK, COORDINATES, ...)                                                  \
    asm volatile("cp.async.bulk.tensor." RANK ".global.shared::cta.bulk_group [%0, {" COORDINATES \
                 "}], [%1];" ::"l"(map),                                                          \
                 "r"(from), __VA_ARGS__                                                           \
                 : "memory")
#endif

// Loads the box at `coordinates` to `destination` and completes its bytes on `barrier`.
template <typename... Coordinates>
HOPPER_INLINE void tma_load(void* destination, const TensorMap* map, Barrier* barrier, CacheHint cache,
                            Coordinates... coordinates) {
    constexpr int kRank = sizeof...(Coordinates);
    static_assert(kRank >= 2 && kRank <= 5);
    const int c[] = {static_cast<int>(coordinates)...};
#if defined(MAGIHUMAN_SIM)
    static_cast<void>(cache);
    sim::tma_load(destination, map, barrier, 0, c, kRank);
#else
    const uint32_t to = shared_address(destination), signal = shared_address(barrier);
    const uint64_t hint = static_cast<uint64_t>(cache);
    if constexpr (kRank == 2) {
        HOPPER_TMA_LOAD("2d", "%4, %5", "r"(c[0]), "r"(c[1]));
    } else if constexpr (kRank == 3) {
        HOPPER_TMA_LOAD("3d", "%4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]));
    } else if constexpr (kRank == 4) {
        HOPPER_TMA_LOAD("4d", "%4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    } else {
        HOPPER_TMA_LOAD("5d", "%4, %5, %6, %7, %8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
    }
#endif
}

// The same box to the same offset in every block of the cluster whose bit is set, each completing its bytes
// on its own copy of `barrier`. All of them must have freed the destination.
template <typename... Coordinates>
HOPPER_INLINE void tma_load_multicast(void* destination, const TensorMap* map, Barrier* barrier,
                                      uint16_t block_mask, CacheHint cache, Coordinates... coordinates) {
    constexpr int kRank = sizeof...(Coordinates);
    static_assert(kRank >= 2 && kRank <= 5);
    const int c[] = {static_cast<int>(coordinates)...};
#if defined(MAGIHUMAN_SIM)
    static_cast<void>(cache);
    sim::tma_load(destination, map, barrier, block_mask, c, kRank);
#else
    const uint32_t to = shared_address(destination), signal = shared_address(barrier);
    const uint64_t hint = static_cast<uint64_t>(cache);
    if constexpr (kRank == 2) {
        HOPPER_TMA_LOAD_MULTICAST("2d", "%5, %6", "r"(c[0]), "r"(c[1]));
    } else if constexpr (kRank == 3) {
        HOPPER_TMA_LOAD_MULTICAST("3d", "%5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]));
    } else if constexpr (kRank == 4) {
        HOPPER_TMA_LOAD_MULTICAST("4d", "%5, %6, %7, %8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    } else {
        HOPPER_TMA_LOAD_MULTICAST("5d", "%5, %6, %7, %8, %9", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]),
                                  "r"(c[4]));
    }
#endif
}

// Stores a box from shared memory; elements outside the tensor are dropped. The writers of `source` must have
// run fence_proxy_async and met this thread at a barrier.
template <typename... Coordinates>
HOPPER_INLINE void tma_store(const TensorMap* map, const void* source, Coordinates... coordinates) {
    constexpr int kRank = sizeof...(Coordinates);
    static_assert(kRank >= 2 && kRank <= 5);
    const int c[] = {static_cast<int>(coordinates)...};
#if defined(MAGIHUMAN_SIM)
    sim::tma_store(map, source, c, kRank);
#else
    const uint32_t from = shared_address(source);
    if constexpr (kRank == 2) {
        HOPPER_TMA_STORE("2d", "%2, %3", "r"(c[0]), "r"(c[1]));
    } else if constexpr (kRank == 3) {
        HOPPER_TMA_STORE("3d", "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2]));
    } else if constexpr (kRank == 4) {
        HOPPER_TMA_STORE("4d", "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    } else {
        HOPPER_TMA_STORE("5d", "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
    }
#endif
}

// Closes a group over this thread's stores since the last commit.
HOPPER_INLINE void tma_store_commit() {
#if defined(MAGIHUMAN_SIM)
    sim::tma_store_commit();
#else
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups still read shared memory: the others' tiles may be
// reused.
template <int kGroups>
HOPPER_INLINE void tma_store_wait_read() {
#if defined(MAGIHUMAN_SIM)
    sim::tma_store_wait(kGroups, true);
#else
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are incomplete: the others' data is in global memory.
template <int kGroups>
HOPPER_INLINE void tma_store_wait() {
#if defined(MAGIHUMAN_SIM)
    sim::tma_store_wait(kGroups, false);
#else
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

#undef HOPPER_TMA_LOAD
#undef HOPPER_TMA_LOAD_MULTICAST
#undef HOPPER_TMA_STORE

}  // namespace magihuman
