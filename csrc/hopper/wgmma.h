// WGMMA: D[64, N] (+)= A[64, K] B[K, N] by the 128 threads of a warpgroup, asynchronously. K spans 32 bytes.
//
// Accumulators: thread t of the warpgroup, with row = 16 (t/32) + (t%32)/4 and column = 2 (t%4), holds
//   d[4j] = D[row, 8j + column]      d[4j + 1] = D[row, 8j + column + 1]
//   d[4j + 2] = D[row + 8, 8j + column]   d[4j + 3] = D[row + 8, 8j + column + 1]
// A in registers (bf16): a[0] = A[row, column..+1], a[1] = A[row + 8, same], a[2] and a[3] = the same 8
// columns further on: packed accumulators of 16 columns are the next product's A.
//
// Order: wgmma_fence, products, wgmma_commit, wgmma_wait<n>. Between the first product and the wait nobody
// may touch d (or a), nor overwrite the shared memory that the descriptors name.
#pragma once

#include "hopper/device.h"

#if !defined(MAGIHUMAN_SIM)
#include <cute/arch/mma_sm90_gmma.hpp>
#if defined(CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#endif
#include <utility>
#endif

namespace magihuman {

// Which way an operand runs in shared memory: along K (rows of the "NT" product), or along M or N.
enum class Major : uint32_t { kK = 0, kMN = 1 };

// The 64-bit matrix descriptor. Offsets in bytes, by layout (chunk = 16 bytes, span = swizzle_span):
//   K-major, swizzled: rows of one span; stride_offset = from 8 rows to the next 8; leading_offset unused.
//   K-major, none: 8 rows x 1 chunk blocks of 128 bytes; stride_offset = to the next 8 rows,
//                  leading_offset = to the next chunk of K.
//   MN-major, swizzled: rows (one per k) of one span of M|N; stride_offset = from 8 k to the next 8,
//                       leading_offset = to the next span of M|N.
//   MN-major, none: 8 k x 1 chunk blocks; stride_offset = to the next chunk of M|N,
//                   leading_offset = from 8 k to the next 8.
// Each has 14 bits in units of 16 bytes. Hardware XORs address bits, so `start` may point at a chunk inside
// the first row of the pattern (a K step of a K-major tile), but the tile itself begins at a multiple of its
// period.
HOPPER_INLINE uint64_t matrix_descriptor(const void* start, uint32_t leading_offset, uint32_t stride_offset,
                                         Swizzle swizzle) {
    constexpr uint64_t kFieldMask = 0x3ffff;
    // The tensor core numbers the modes downwards: 1 is 128 bytes, 3 is 32 bytes.
    const uint64_t mode = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<uint64_t>(swizzle);
    return (shared_address(start) & kFieldMask) >> 4 | (leading_offset & kFieldMask) >> 4 << 16 |
           (stride_offset & kFieldMask) >> 4 << 32 | mode << 62;
}

// A tile of rows packed at the span's pitch, as one TMA box with an inner row of one span leaves it.
template <Swizzle kSwizzle>
HOPPER_INLINE uint64_t k_major_descriptor(const void* start) {
    static_assert(kSwizzle != Swizzle::kNone, "without swizzle the offsets are the caller's choice");
    return matrix_descriptor(start, 16, 8 * swizzle_span(kSwizzle), kSwizzle);
}

// The same box read the other way: its rows are k, its inner dimension M or N. `span_offset`: bytes from the
// box of one span of M|N to the box of the next (0 where there is only one).
template <Swizzle kSwizzle>
HOPPER_INLINE uint64_t mn_major_descriptor(const void* start, uint32_t span_offset) {
    static_assert(kSwizzle != Swizzle::kNone, "without swizzle the offsets are the caller's choice");
    return matrix_descriptor(start, span_offset, 8 * swizzle_span(kSwizzle), kSwizzle);
}

// The descriptor of the tile that starts `bytes` further on (a multiple of 16).
HOPPER_INLINE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Orders earlier register accesses to accumulators and A before the products that follow.
HOPPER_INLINE void wgmma_fence() {
#if defined(MAGIHUMAN_SIM)
    sim::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

HOPPER_INLINE void wgmma_commit() {
#if defined(MAGIHUMAN_SIM)
    sim::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kGroups of the latest groups are unfinished.
template <int kGroups>
HOPPER_INLINE void wgmma_wait() {
    static_assert(kGroups >= 0 && kGroups <= 7);
#if defined(MAGIHUMAN_SIM)
    sim::wgmma_wait(kGroups);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// Ties the accumulators to this point of the program: the compiler does not see that a wait fills them, and
// might otherwise read them before it.
template <int kCount>
HOPPER_INLINE void wgmma_results([[maybe_unused]] float (&d)[kCount]) {
#if !defined(MAGIHUMAN_SIM)
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#if !defined(MAGIHUMAN_SIM)

namespace wgmma_shapes {

template <int kN>
struct Shape;

template <Major kMajor>
constexpr auto kCuteMajor = kMajor == Major::kK ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;

#define HOPPER_WGMMA_SHAPE(N)                                                                            \
    template <>                                                                                          \
    struct Shape<N> {                                                                                    \
        template <Major kA, Major kB>                                                                    \
        using Bf16SS = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kCuteMajor<kA>, kCuteMajor<kB>>; \
        template <Major kB>                                                                              \
        using Bf16RS =                                                                                   \
            cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<kCuteMajor<Major::kK>, kCuteMajor<kB>>;     \
    };
#define HOPPER_WGMMA_SHAPES_4(A, B, C, D) \
    HOPPER_WGMMA_SHAPE(A) HOPPER_WGMMA_SHAPE(B) HOPPER_WGMMA_SHAPE(C) HOPPER_WGMMA_SHAPE(D)

HOPPER_WGMMA_SHAPES_4(8, 16, 32, 64)
HOPPER_WGMMA_SHAPES_4(96, 128, 192, 256)
// The other multiples of 8 live in a header that takes seconds to compile: opt in before including this one.
#if defined(CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
HOPPER_WGMMA_SHAPES_4(24, 40, 48, 56)
HOPPER_WGMMA_SHAPES_4(72, 80, 88, 104)
HOPPER_WGMMA_SHAPES_4(112, 120, 136, 144)
HOPPER_WGMMA_SHAPES_4(152, 160, 168, 176)
HOPPER_WGMMA_SHAPES_4(184, 200, 208, 216)
HOPPER_WGMMA_SHAPES_4(224, 232, 240, 248)
#endif
#undef HOPPER_WGMMA_SHAPES_4
#undef HOPPER_WGMMA_SHAPE

template <typename Instruction, typename... Operands, int kRegisters, size_t... kIndex>
HOPPER_INLINE void issue(float (&d)[kRegisters], bool accumulate, std::index_sequence<kIndex...>,
                         Operands... operands) {
    Instruction::fma(operands..., d[kIndex]...,
                     accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

}  // namespace wgmma_shapes

#endif

// Both operands bf16 in shared memory. With `accumulate` false D starts from zero.
template <int kN, Major kA = Major::kK, Major kB = Major::kK>
HOPPER_INLINE void wgmma_bf16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
#if defined(MAGIHUMAN_SIM)
    sim::wgmma({kN, kA == Major::kMN, kB == Major::kMN, accumulate, false, a, b}, d, nullptr);
#else
    using Instruction = typename wgmma_shapes::Shape<kN>::template Bf16SS<kA, kB>;
    wgmma_shapes::issue<Instruction>(d, accumulate, std::make_index_sequence<kN / 2>{}, a, b);
#endif
}

// A from registers.
template <int kN, Major kB = Major::kK>
HOPPER_INLINE void wgmma_bf16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#if defined(MAGIHUMAN_SIM)
    sim::wgmma({kN, false, kB == Major::kMN, accumulate, true, 0, b}, d, a);
#else
    using Instruction = typename wgmma_shapes::Shape<kN>::template Bf16RS<kB>;
    wgmma_shapes::issue<Instruction>(d, accumulate, std::make_index_sequence<kN / 2>{}, a[0], a[1], a[2],
                                     a[3], b);
#endif
}

}  // namespace magihuman
