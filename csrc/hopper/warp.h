// Operations of one warp: shuffles and the matrix moves between registers and shared memory.
// All 32 lanes take part in each.
#pragma once

#include "hopper/device.h"

namespace magihuman {

constexpr uint32_t kFullWarp = 0xffffffffu;

HOPPER_INLINE uint32_t lane_id() { return threadIdx.x % 32; }

// The warp's number in the block, in a form the compiler knows to be the same in all lanes.
HOPPER_INLINE uint32_t warp_id() {
#if defined(MAGIHUMAN_SIM)
    return threadIdx.x / 32;
#else
    return __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
#endif
}

HOPPER_INLINE void warp_sync() {
#if defined(MAGIHUMAN_SIM)
    sim::warp_sync();
#else
    __syncwarp();
#endif
}

// The value of the lane whose number differs by XOR with `mask`. T has 4 or 8 bytes.
template <typename T>
HOPPER_INLINE T shuffle_xor(T value, uint32_t mask) {
#if defined(MAGIHUMAN_SIM)
    return sim::shuffle(value, lane_id() ^ mask);
#else
    return __shfl_xor_sync(kFullWarp, value, mask);
#endif
}

// The value of lane `source`.
template <typename T>
HOPPER_INLINE T shuffle(T value, uint32_t source) {
#if defined(MAGIHUMAN_SIM)
    return sim::shuffle(value, source % 32);
#else
    return __shfl_sync(kFullWarp, value, source);
#endif
}

// Bit i: the predicate of lane i.
HOPPER_INLINE uint32_t ballot(bool predicate) {
#if defined(MAGIHUMAN_SIM)
    return sim::ballot(predicate);
#else
    return __ballot_sync(kFullWarp, predicate);
#endif
}

// stmatrix/ldmatrix move four 8x8 matrices of 16-bit elements. Lane 8i + r gives the shared address (16-byte
// aligned) of row r of matrix i. Register i of lane l holds row l/4, columns 2(l%4) and +1 of matrix i, which
// is the WGMMA accumulator layout after packing to 16 bits; with kTransposed it holds column l/4, rows
// 2(l%4), +1.
template <bool kTransposed = false>
HOPPER_INLINE void stmatrix_x4(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
#if defined(MAGIHUMAN_SIM)
    const uint32_t registers[4] = {m0, m1, m2, m3};
    sim::stmatrix(row, registers, kTransposed);
#else
    if constexpr (kTransposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         shared_address(row)),
                     "r"(m0), "r"(m1), "r"(m2), "r"(m3)
                     : "memory");
    } else {
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
            "r"(m0), "r"(m1), "r"(m2), "r"(m3)
            : "memory");
    }
#endif
}

template <bool kTransposed = false>
HOPPER_INLINE void ldmatrix_x4(const void* row, uint32_t (&m)[4]) {
#if defined(MAGIHUMAN_SIM)
    sim::ldmatrix(row, m, kTransposed);
#else
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
#endif
}

}  // namespace magihuman
