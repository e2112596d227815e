// x += bf16(product), x in float32. The four lanes of a quad hold 32 consecutive bytes of a row: whole sectors,
// so registers meet memory directly. What x costs is latency: the lines are fetched to L2 beside the last
// products, and 32 values a lane are read at a time.
#pragma once

#include "gemm/epilogue_store.cuh"

namespace magihuman::gemm {

// Asks L2 for the line of `address`; nothing waits for it.
HOPPER_INLINE void prefetch_global([[maybe_unused]] const void* address) {
#if defined(MAGIHUMAN_SIM)
    sim::check_global_access(address, 1);
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

struct ResidualEpilogue {
    static constexpr int kNarrowColumns = 0;
    static constexpr bool kPrefetches = true;

    float* x;
    int64_t ldx;
    int n;

    // One 128-byte line per call and lane: line `i` of the warp's rows.
    template <int kN>
    HOPPER_INLINE void prefetch(const WarpTile& tile, int i) const {
        constexpr int kLines = kN / 32;
        const int line = i * 32 + static_cast<int>(tile.lane), row = line / kLines;
        const int column = tile.column + line % kLines * 32;
        if (row < tile.rows && column < n) prefetch_global(x + (tile.row + row) * ldx + column);
    }

    template <int kN>
    HOPPER_INLINE void operator()(const float (&acc)[kN / 2], const WarpTile& tile) const {
        if (n - tile.column >= kN) {
            add<kN, false>(acc, tile);
        } else {
            add<kN, true>(acc, tile);
        }
    }

  private:
    template <int kN, bool kRagged>
    HOPPER_INLINE void add(const float (&acc)[kN / 2], const WarpTile& tile) const {
        constexpr int kBatch = 16;  // blocks of 8 columns whose x is under way at a time
        const int lane = static_cast<int>(tile.lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half, first_column = tile.column + lane % 4 * 2;
            if (row >= tile.rows) continue;
            float* at = x + (tile.row + row) * ldx + first_column;
            const int left = n - first_column;
#pragma unroll
            for (int first = 0; first < kN / 8; first += kBatch) {
                float2 before[kBatch];
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const int c = 8 * (first + j);
                    if (!kRagged || c + 1 < left)
                        before[j] = load_global(reinterpret_cast<const float2*>(at + c));
                }
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const int c = 8 * (first + j), r = 4 * (first + j) + 2 * half;
                    const uint32_t pair = pack_bf16x2(acc[r], acc[r + 1]);
                    if (!kRagged || c + 1 < left) {
                        store_global(
                            reinterpret_cast<float2*>(at + c),
                            make_float2(before[j].x + low_bf16(pair), before[j].y + high_bf16(pair)));
                    } else if (c < left) {
                        store_global(at + c, load_global(at + c) + low_bf16(pair));
                    }
                }
            }
        }
    }
};

}  // namespace magihuman::gemm
