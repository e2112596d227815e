// d = bf16(gated7(gate) (clamp(linear, -7, 7) + 1)) of interleaved columns: even ones are the gate, odd ones
// the linear part, so one thread's accumulator pair holds both and the columns are halved. Columns width ..
// d_cols are written as zero: they pad the next product's K.
#pragma once

#include "gemm/epilogue_bf16.cuh"

namespace magihuman::gemm {

struct Swiglu7Epilogue {
    static constexpr int kNarrowColumns = 0;
    static constexpr bool kPrefetches = false;

    bf16* d;
    int64_t ldd;
    int width, d_cols;

    HOPPER_INLINE static float activate(float gate, float linear) {
        const uint32_t pair = pack_bf16x2(gate, linear);
        const float l = high_bf16(pair), below = l > 7.0f ? 7.0f : l, clamped = below < -7.0f ? -7.0f : below;
        return gated7(low_bf16(pair)) * (clamped + 1.0f);
    }

    template <int kN>
    HOPPER_INLINE void operator()(const float (&acc)[kN / 2], const WarpTile& tile) const {
        const int first = tile.column / 2;
        if (first + kN / 2 <= width) {
            stage<kN, false>(acc, tile);
        } else {
            stage<kN, true>(acc, tile);
        }
        store_staged<kN / 2>(tile, d + tile.row * ldd + first, ldd, d_cols - first);
    }

  private:
    template <int kN, bool kPads>
    HOPPER_INLINE void stage(const float (&acc)[kN / 2], const WarpTile& tile) const {
        static_assert(kN / 2 <= kStagedColumns);
        const uint32_t lane = tile.lane, quad = lane % 4;
        const bool odd = quad % 2 != 0;
#pragma unroll
        for (int j = 0; j < kN / 8; j += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Block j gives output columns 4j + quad: neighbouring columns sit in neighbouring lanes. Even
                // lanes complete their pair of block j, odd lanes theirs of block j + 1.
                const float* v = acc + 4 * j + 2 * half;
                const int column = tile.column / 2 + 4 * j + static_cast<int>(quad);
                float y0 = activate(v[0], v[1]), y1 = activate(v[4], v[5]);
                if (kPads && column >= width) y0 = 0;
                if (kPads && column + 4 >= width) y1 = 0;
                const float other = shuffle_xor(odd ? y0 : y1, 1);
                const uint32_t pair = odd ? pack_bf16x2(other, y1) : pack_bf16x2(y0, other);
                uint8_t* row = staged(tile.staging, lane / 4 + 8 * half, j / 2);
                store_shared(row + (odd ? 8 : 0) + quad / 2 * 4, pair);
            }
        }
    }
};

}  // namespace magihuman::gemm
