// d = bf16(f(bf16(product))) for a function f of one element: none, or GELU7.
#pragma once

#include "gemm/epilogue_store.cuh"

namespace magihuman::gemm {

struct Identity {
    HOPPER_INLINE static uint32_t apply(uint32_t pair) { return pair; }
};

// u sigmoid(1.702 u) with u = min(x, 7). A comparison, unlike min, lets NaN through.
HOPPER_INLINE float gated7(float x) {
    const float u = x > 7.0f ? 7.0f : x;
    return u * sigmoid(1.702f * u);
}

struct Gelu7 {
    HOPPER_INLINE static uint32_t apply(uint32_t pair) {
        return pack_bf16x2(gated7(low_bf16(pair)), gated7(high_bf16(pair)));
    }
};

template <typename Function>
struct Bf16Epilogue {
    static constexpr int kNarrowColumns = 0;
    static constexpr bool kPrefetches = false;

    bf16* d;
    int64_t ldd;
    int n;

    template <int kN>
    HOPPER_INLINE void operator()(const float (&acc)[kN / 2], const WarpTile& tile) const {
        constexpr int kPass = kN < kStagedColumns ? kN : kStagedColumns;
#pragma unroll
        for (int pass = 0; pass < kN / kPass; ++pass) {
#pragma unroll
            for (int j = 0; j < kPass / 16; ++j) {
                const float* v = acc + pass * kPass / 2 + j * 8;
                stage_columns(tile, j, Function::apply(pack_bf16x2(v[0], v[1])),
                              Function::apply(pack_bf16x2(v[2], v[3])),
                              Function::apply(pack_bf16x2(v[4], v[5])),
                              Function::apply(pack_bf16x2(v[6], v[7])));
            }
            const int column = tile.column + pass * kPass;
            store_staged<kPass>(tile, d + tile.row * ldd + column, ldd, n - column);
        }
    }
};

}  // namespace magihuman::gemm
