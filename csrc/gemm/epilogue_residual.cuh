// x += bf16(product), x in float32. The four lanes of a quad hold 32 consecutive bytes of a row: whole sectors, which L2
// adds where they lie. Every element of x is added to once a launch, so the order of additions does not matter. The
// lines are fetched to L2 beside the last products.
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
        const int lane = static_cast<int>(tile.lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half, first_column = tile.column + lane % 4 * 2;
            if (row >= tile.rows) continue;
            float* at = x + (tile.row + row) * ldx + first_column;
            const int left = n - first_column;
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
                const int c = 8 * j, r = 4 * j + 2 * half;
                const uint32_t pair = pack_bf16x2(acc[r], acc[r + 1]);
                if (!kRagged || c + 1 < left) {
                    reduce_add_global(reinterpret_cast<float2*>(at + c),
                                      make_float2(low_bf16(pair), high_bf16(pair)));
                } else if (c < left) {
                    reduce_add_global(at + c, low_bf16(pair));
                }
            }
        }
    }
};

}  // namespace magihuman::gemm
