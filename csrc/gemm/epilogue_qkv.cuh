// Columns: q heads, k heads, v heads of 128, then one gate logit per q head. A tile holds whole heads.
//   q, k   bf16(rotate(v rsqrt(mean v^2 + eps) (1 + w))), v the bf16 product, w of the row's range
//   v      the product
//   gate   the product, as float32
// The 128 columns of a row lie in one quad of lanes, and the columns i and i + 48 that rotate together lie in
// one lane, 24 accumulators apart.
#pragma once

#include "gemm/epilogue_store.cuh"

namespace magihuman::gemm {

struct QkvEpilogue {
    // At most 64 gate columns left over: a product of 64 columns instead of a whole tile.
    static constexpr int kNarrowColumns = 64;
    static constexpr bool kPrefetches = false;
    static constexpr int kHead = 128, kRotated = 48;
    static constexpr float kEps = 1e-6f;

    const float* q_norm;  // [groups, 128]
    const float* k_norm;
    const float* rope;  // [M, 96]
    bf16* q;
    bf16* k;
    bf16* v;
    float* gate;
    int q_heads, kv_heads;

    template <int kN>
    HOPPER_INLINE void operator()(float (&acc)[kN / 2], const WarpTile& tile) const {
        if (tile.rows <= 0) return;
        constexpr int kColumns = kN < kHead ? kN : kHead, kBlocks = kN / kColumns;
        const int gate_head = q_heads + 2 * kv_heads;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const int head = tile.column / kHead + block;
            float* values = acc + block * kHead / 2;
            if (head >= gate_head) {
                store_gate<kColumns>(values, tile, (head - gate_head) * kHead);
            } else if constexpr (kN >= kHead) {
                if (head < q_heads + kv_heads) {
                    normalise((head < q_heads ? q_norm : k_norm) + tile.group * kHead, values, tile);
                }
                store_head(values, head, tile);
            }
        }
    }

  private:
    // In place: the accumulators of one q or k head, two rows a lane.
    HOPPER_INLINE void normalise(const float* norm, float* values, const WarpTile& tile) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int lane = static_cast<int>(opaque(tile.lane)), column = lane % 4 * 2;
            float* u = values + 2 * half;  // u[4j], u[4j + 1]: columns 8j + column, + 1
            const float scale = round_and_scale(u);
#pragma unroll
            for (int j = 0; j < kHead / 8; ++j) {
                const auto w = load_global_constant(reinterpret_cast<const float2*>(norm + 8 * j + column));
                u[4 * j] *= scale * (1.0f + w.x);
                u[4 * j + 1] *= scale * (1.0f + w.y);
            }
            // Rows that are not stored read the angles of the last one that is.
            const int row = min(lane / 4 + 8 * half, tile.rows - 1);
            const float* angles = rope + int64_t{tile.row + row} * (2 * kRotated) + column;
#pragma unroll
            for (int j = 0; j < kRotated / 8; ++j) {
                const auto sine = load_global_constant(reinterpret_cast<const float2*>(angles + 8 * j));
                const auto cosine =
                    load_global_constant(reinterpret_cast<const float2*>(angles + kRotated + 8 * j));
                rotate(u[4 * j], u[4 * j + kRotated / 2], sine.x, cosine.x);
                rotate(u[4 * j + 1], u[4 * j + 1 + kRotated / 2], sine.y, cosine.y);
            }
        }
    }

    // Rounds one row of a head to bf16 and returns 1 / rms of it.
    HOPPER_INLINE static float round_and_scale(float* u) {
        float squares = 0;
#pragma unroll
        for (int j = 0; j < kHead / 8; ++j) {
            const uint32_t pair = pack_bf16x2(u[4 * j], u[4 * j + 1]);
            u[4 * j] = low_bf16(pair);
            u[4 * j + 1] = high_bf16(pair);
            squares += u[4 * j] * u[4 * j] + u[4 * j + 1] * u[4 * j + 1];
        }
        squares += shuffle_xor(squares, 1);
        squares += shuffle_xor(squares, 2);
        return fast_rsqrt(squares * (1.0f / kHead) + kEps);
    }

    HOPPER_INLINE static void rotate(float& a, float& b, float sine, float cosine) {
        const float turned = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = turned;
    }

    HOPPER_INLINE void store_head(const float* values, int head, const WarpTile& tile) const {
        const bool is_q = head < q_heads, is_k = !is_q && head < q_heads + kv_heads;
        const int64_t pitch = int64_t{is_q ? q_heads : kv_heads} * kHead;
        bf16* to = is_q ? q : is_k ? k : v;
        to += tile.row * pitch + (head - (is_q ? 0 : is_k ? q_heads : q_heads + kv_heads)) * kHead;
#pragma unroll
        for (int j = 0; j < kHead / 16; ++j) {
            const float* u = values + 8 * j;
            stage_columns(tile, j, pack_bf16x2(u[0], u[1]), pack_bf16x2(u[2], u[3]), pack_bf16x2(u[4], u[5]),
                          pack_bf16x2(u[6], u[7]));
        }
        store_staged<kHead>(tile, to, pitch, kHead);
    }

    template <int kColumns>
    HOPPER_INLINE void store_gate(const float* values, const WarpTile& tile, int first) const {
        const int lane_row = static_cast<int>(tile.lane) / 4,
                  lane_column = static_cast<int>(tile.lane) % 4 * 2;
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
            const int row = lane_row + i / 2 % 2 * 8, column = first + i / 4 * 8 + lane_column + i % 2;
            if (row < tile.rows && column < q_heads) {
                store_global(gate + int64_t{tile.row + row} * q_heads + column, to_float(to_bf16(values[i])));
            }
        }
    }
};

}  // namespace magihuman::gemm
