// A 64 x 64 tile of A BT in float32 on the ordinary arithmetic units, for the embedders and the head (NOTES.md
// says why not on the tensor cores).
//
// 128 threads; thread t owns rows 8 (t / 16) .. +7 and columns 4 (t % 16) .. +3. Operands arrive 16 k at a
// time: registers, then shared memory with k outermost, so that a step of k is three 16-byte reads for 32
// multiply-adds. Loading k + 16 overlaps computing k.
//
// Shared memory: two stages of A [16][64], B [16][64].
#pragma once

#include "hopper/device.h"
#include "hopper/memory.h"
#include "hopper/sync.h"

namespace magihuman::float32_product {

constexpr int kTile = 64, kStep = 16, kThreads = 128, kRows = 8, kColumns = 4;
constexpr int kStageFloats = 2 * kStep * kTile;
constexpr uint32_t kSharedBytes = 2 * kStageFloats * sizeof(float);
// The sum over k is one of sums over 256 each: thousands of additions in one line would lose a digit.
constexpr int kStepsPerSum = 16;
// 32 sums, twice, 16 operands on the way and 12 in use, with their addresses: some 140 registers.
constexpr uint32_t kBlocksPerProcessor = 3;

// What a thread loads: 8 consecutive k of one row of each operand.
HOPPER_INLINE int load_row() { return static_cast<int>(threadIdx.x) % kTile; }
HOPPER_INLINE int load_offset() { return static_cast<int>(threadIdx.x) / kTile * 8; }

HOPPER_INLINE int first_row() { return static_cast<int>(threadIdx.x) / 16 * kRows; }
HOPPER_INLINE int first_column() { return static_cast<int>(threadIdx.x) % 16 * kColumns; }

// 8 floats of a row, or zeros. row: 16-byte aligned, null where there is none.
HOPPER_INLINE void load_8(const float* row, int k, int depth, float (&to)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float4 v = make_float4(0, 0, 0, 0);
        if (row != nullptr && k < depth) {
            v = load_global_constant(reinterpret_cast<const float4*>(row + k) + half);
        }
        to[4 * half] = v.x, to[4 * half + 1] = v.y, to[4 * half + 2] = v.z, to[4 * half + 3] = v.w;
    }
}

// sum = A BT over k = 0 .. depth - 1 (a multiple of 8). load_a(k, to) and load_b(k, to) give k .. k + 7 of row
// load_row() of their operand. The whole block calls it; shared memory is free again on return.
template <typename LoadA, typename LoadB>
HOPPER_INLINE void multiply(int depth, LoadA&& load_a, LoadB&& load_b, float (&sum)[kRows][kColumns]) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
    const int row = load_row(), offset = load_offset();
    float a[8], b[8], part[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) {
        sum[i / kColumns][i % kColumns] = 0;
        part[i / kColumns][i % kColumns] = 0;
    }
    load_a(offset, a);
    load_b(offset, b);
    const int steps = (depth + kStep - 1) / kStep;
    for (int step = 0; step < steps; ++step) {
        float* a_stage = shared + step % 2 * kStageFloats;
        float* b_stage = a_stage + kStep * kTile;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            store_shared(a_stage + (offset + i) * kTile + row, a[i]);
            store_shared(b_stage + (offset + i) * kTile + row, b[i]);
        }
        // Also says that nobody still reads the other stage, which the next round writes.
        block_sync();
        if (step + 1 < steps) {
            load_a((step + 1) * kStep + offset, a);
            load_b((step + 1) * kStep + offset, b);
        }
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
            const float4 a0 = load_shared<float4>(a_stage + k * kTile + first_row());
            const float4 a1 = load_shared<float4>(a_stage + k * kTile + first_row() + 4);
            const float4 b0 = load_shared<float4>(b_stage + k * kTile + first_column());
            const float rows[kRows] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
            const float columns[kColumns] = {b0.x, b0.y, b0.z, b0.w};
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) part[i][j] = fmaf(rows[i], columns[j], part[i][j]);
            }
        }
        if (step % kStepsPerSum == kStepsPerSum - 1 || step + 1 == steps) {
#pragma unroll
            for (int i = 0; i < kRows * kColumns; ++i) {
                sum[i / kColumns][i % kColumns] += part[i / kColumns][i % kColumns];
                part[i / kColumns][i % kColumns] = 0;
            }
        }
    }
    block_sync();
}

}  // namespace magihuman::float32_product
