// What happens to scores between the two products, in registers: masking, the running softmax, and weights packed as the
// next operand. A thread holds two rows (row, row + 8) of a tile of scores, in the accumulator layout of WGMMA.
#pragma once

#include "attention/schedule.h"
#include "hopper/numeric.h"
#include "hopper/warp.h"

namespace magihuman::attention {

// The running softmax of a thread's two rows (row, row + 8), each shared by four lanes.
struct Softmax {
    float maximum[2] = {kNothing, kNothing};  // of the scores so far
    float sum[2] = {0, 0};                    // of this thread's weights, relative to the maximum

    static constexpr float kNothing = -__builtin_huge_valf();
    // exp(s / sqrt(128)) = 2^(s kScale)
    static constexpr float kScale = 1.4426950408889634f / 11.313708498984761f;

    // Scores become weights. Returns what the earlier sums are to be multiplied by.
    template <int kCount>
    HOPPER_INLINE void update(float (&s)[kCount], float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most[2] = {maximum[half], s[2 * half]};
#pragma unroll
            for (int j = 0; j < kCount / 4; ++j) {
                most[0] = max(most[0], s[4 * j + 2 * half]);
                most[1] = max(most[1], s[4 * j + 2 * half + 1]);
            }
            float now = max(most[0], most[1]);
            now = max(now, shuffle_xor(now, 1));
            now = max(now, shuffle_xor(now, 2));
            // A row that has seen no key yet: 2^(-inf - 0) = 0 where -inf - -inf would be NaN.
            const float offset = now == kNothing ? 0.0f : now * kScale;
            rescale[half] = fast_exp2(maximum[half] * kScale - offset);
            maximum[half] = now;
            float added[2] = {sum[half] * rescale[half], 0};
#pragma unroll
            for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& value = s[4 * j + 2 * half + i];
                    value = fast_exp2(fmaf(value, kScale, -offset));
                    added[i] += value;
                }
            }
            sum[half] = added[0] + added[1];
        }
    }

    // The whole rows' sums.
    HOPPER_INLINE float total(int half) const {
        float all = sum[half];
        all += shuffle_xor(all, 1);
        return all + shuffle_xor(all, 2);
    }
};

// Scores of keys that a row does not see become -inf. `row`: the thread's first one.
template <int kN>
HOPPER_INLINE void mask(float (&s)[kN / 2], const QueryTile& tile, int j, int row, const Tokens& tokens) {
    const int column = tile.key_start(j, kN) + static_cast<int>(lane_id()) % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const KeySpan seen = tile.visible(j, kN, row + 8 * half, tokens);
        const int begin = seen.begin - column, end = seen.end - column;
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) {
            const int at = i / 2 * 8 + i % 2;
            if (at < begin || at >= end) s[i / 2 * 4 + 2 * half + i % 2] = Softmax::kNothing;
        }
    }
}

// Weights as the A operand of the next product: 16 columns are four registers.
template <int kN>
HOPPER_INLINE void pack_weights(uint32_t (&p)[kN / 16][4], const float (&s)[kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) p[i / 4][i % 4] = pack_bf16x2(s[2 * i], s[2 * i + 1]);
}

}  // namespace magihuman::attention
