// The ground every kernel source stands on: the CUDA language, on the device as nvcc gives it and in the
// simulator as csrc/sim provides it, so that one kernel source compiles unchanged under both.
//
// A kernel includes this header first and then the instruction headers that it uses.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(MAGIHUMAN_SIM)
#include "sim/instructions.h"
#define HOPPER_INLINE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HOPPER_INLINE __device__ __forceinline__
#endif

namespace magihuman {

// How 16-byte chunks are permuted inside shared memory. kBytesN: chunks move inside rows of N bytes, by XOR
// with the row's number. The same four modes exist for the copy engine and for the tensor cores.
enum class Swizzle : uint32_t { kNone, kBytes32, kBytes64, kBytes128 };

// Bytes of one row of the pattern; without swizzle one 16-byte chunk.
__host__ __device__ constexpr uint32_t swizzle_span(Swizzle swizzle) {
    return 16u << static_cast<uint32_t>(swizzle);
}

// The pattern repeats every eight rows: a tile must start on a multiple of this.
__host__ __device__ constexpr uint32_t swizzle_period(Swizzle swizzle) {
    return swizzle == Swizzle::kNone ? 16u : 8 * swizzle_span(swizzle);
}

// Where the byte at `offset` of a tile (tile start aligned to swizzle_period) really lies: bits 4.. are XORed
// with bits 7.., as many as the span has. Epilogues that write a tile for a TMA store use it.
__host__ __device__ constexpr uint32_t swizzle_offset(uint32_t offset, Swizzle swizzle) {
    const uint32_t mask = (swizzle_span(swizzle) - 1) & 0x70;
    return offset ^ ((offset >> 3) & mask);
}

// The block's dynamic shared memory. Kernels declare no static __shared__: everything lives in one map.
HOPPER_INLINE uint8_t* dynamic_shared_memory() {
#if defined(MAGIHUMAN_SIM)
    return sim::dynamic_shared_memory();
#else
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    return shared_memory;
#endif
}

// The 32-bit address that instructions take for a pointer into this block's shared memory.
HOPPER_INLINE uint32_t shared_address(const void* pointer) {
#if defined(MAGIHUMAN_SIM)
    return sim::shared_address(pointer);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// What this thread does in the kernel, for the simulator's messages. Nothing on the device.
HOPPER_INLINE void role([[maybe_unused]] const char* name) {
#if defined(MAGIHUMAN_SIM)
    sim::role(name);
#endif
}

}  // namespace magihuman
