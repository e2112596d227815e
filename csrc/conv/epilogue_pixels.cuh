// From accumulators to pixels, with what comes between this convolution and the next:
//   v = bf16(product + bias), then bf16(v + shortcut) where there is one
//   out = v, or with a positive out_eps bf16(v / rms(v))
//   normed = bf16(act(bf16(v / rms(v)))), rms(v) = sqrt(mean over channels of v^2 + eps)
// The norms need all channels of a pixel in one tile: they lie in one quad of lanes, so a sum takes two shuffles.
//
// Each warp turns its 16 pixels through a staging area of its own (gemm/epilogue_store.cuh), 128 channels at a
// time, in the shortcut's direction too: whole lines in memory, no barrier.
#pragma once

#include "conv/pixel_tiles.cuh"
#include "gemm/epilogue_residual.cuh"
#include "gemm/epilogue_store.cuh"

namespace magihuman::conv {

enum class Activation : int { kNone, kSilu, kRelu };

// bf16(act(bf16(value))) of two values.
HOPPER_INLINE uint32_t activate(float a, float b, Activation act) {
    const uint32_t pair = pack_bf16x2(a, b);
    if (act == Activation::kNone) return pair;
    a = low_bf16(pair), b = high_bf16(pair);
    if (act == Activation::kSilu) return pack_bf16x2(a * sigmoid(a), b * sigmoid(b));
    // A comparison, unlike max, lets NaN through.
    return pack_bf16x2(a < 0 ? 0.0f : a, b < 0 ? 0.0f : b);
}

struct PixelEpilogue {
    const float* bias;  // [phases, channels]
    Placement place;
    Frames shortcut, out, normed;
    float out_eps;  // 0: out is v itself
    float eps;
    Activation activation;

    // Asks L2 for the lines of the shortcut.
    template <int kN>
    HOPPER_INLINE void prefetch(const Grid& grid, const PixelTile& given) const {
        if (shortcut.data == nullptr) return;
        const PixelTile tile = kept(grid, given);
        const PixelAddress at = address_of(grid, place, tile, shortcut.frames);
        constexpr int kLines = kN / 64;
#pragma unroll 1
        for (int i = static_cast<int>(tile.lane); i < 16 * kLines; i += 32) {
            const int row = i / kLines / 8, column = i / kLines % 8, channel = tile.channel + i % kLines * 64;
            if (row < tile.rows && column < tile.columns && channel < grid.channels) {
                gemm::prefetch_global(shortcut.data + at.first + row * at.row_pitch +
                                      column * at.pixel_pitch + channel);
            }
        }
    }

    template <int kN>
    HOPPER_INLINE void operator()(const Grid& grid, float (&acc)[kN / 2], const PixelTile& tile) const {
        add_bias<kN>(grid, acc, tile);
        finish<kN>(grid, acc, tile);
    }

    // The bias of channels lane / 4 and that + 8 of the 16 that a warp of a swapped product has; 0 beyond the last.
    HOPPER_INLINE void lane_bias(const Grid& grid, int first, int warp, float (&b)[2]) const {
        const int channel = first + warp * 16 + static_cast<int>(lane_id()) / 4;
        if (channel < grid.channels) b[0] = load_global_constant(bias + channel);
        if (channel + 8 < grid.channels) b[1] = load_global_constant(bias + channel + 8);
    }

    // What follows v = bf16(product + bias), which `acc` holds.
    template <int kN>
    HOPPER_INLINE void finish(const Grid& grid, float (&acc)[kN / 2], const PixelTile& given) const {
        const PixelTile tile = kept(grid, given);
        if (shortcut.data != nullptr) add_shortcut<kN>(grid, acc, tile);
        float mean[2] = {0, 0};
        if (out_eps > 0 || normed.data != nullptr) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < kN / 8; ++j) {
                    const float a = acc[4 * j + 2 * half], b = acc[4 * j + 2 * half + 1];
                    mean[half] += a * a + b * b;
                }
                mean[half] += shuffle_xor(mean[half], 1);
                mean[half] += shuffle_xor(mean[half], 2);
                mean[half] /= static_cast<float>(grid.channels);
            }
        }
        // One body for both outputs: scaling by one leaves v as it is.
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
            const Frames to = which == 0 ? out : normed;
            if (to.data == nullptr) continue;
            const float e = which == 0 ? out_eps : eps;
            const bool scaled = which == 1 || out_eps > 0;
            const float scale[2] = {scaled ? fast_rsqrt(mean[0] + e) : 1.0f,
                                    scaled ? fast_rsqrt(mean[1] + e) : 1.0f};
            const Activation act = which == 0 ? Activation::kNone : activation;
            store<kN>(grid, acc, tile, to, scale, act);
        }
    }

  private:
    // A frame before the first one is dropped: nothing of it is read or stored.
    HOPPER_INLINE PixelTile kept(const Grid& grid, PixelTile tile) const {
        if (grid.phases == 2 && tile.t * place.time_scale + tile.phase < place.drop) tile.rows = 0;
        return tile;
    }

    // In place: bf16(product + bias); columns beyond the last channel become zero.
    template <int kN>
    HOPPER_INLINE void add_bias(const Grid& grid, float (&acc)[kN / 2], const PixelTile& tile) const {
        const int left = grid.channels - tile.channel;
        const float* from =
            bias + tile.phase % bias_phases(grid) * grid.channels + tile.channel + tile.lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            const bool exists = 8 * j < left;
            const float2 b = exists ? load_global_constant(reinterpret_cast<const float2*>(from + 8 * j))
                                    : make_float2(0, 0);
            float* v = acc + 4 * j;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t pair = pack_bf16x2(v[2 * half] + b.x, v[2 * half + 1] + b.y);
                v[2 * half] = exists ? low_bf16(pair) : 0.0f;
                v[2 * half + 1] = exists ? high_bf16(pair) : 0.0f;
            }
        }
    }

    // The four phases of a spatial upsampling share their bias.
    HOPPER_INLINE static int bias_phases(const Grid& grid) { return grid.phases == 4 ? 1 : grid.phases; }

    template <int kN>
    HOPPER_INLINE void add_shortcut(const Grid& grid, float (&acc)[kN / 2], const PixelTile& tile) const {
        constexpr int kPass = kN < gemm::kStagedColumns ? kN : gemm::kStagedColumns;
        constexpr int kChunks = kPass / 8;
        const PixelAddress at = address_of(grid, place, tile, shortcut.frames);
#pragma unroll
        for (int pass = 0; pass < kN / kPass; ++pass) {
            const int channel = tile.channel + pass * kPass;
            const bf16* from = shortcut.data + at.first + channel;
            uint4 line[kChunks / 2];
#pragma unroll
            for (int i = 0; i < kChunks / 2; ++i) {
                const int n = i * 32 + static_cast<int>(tile.lane), pixel = n / kChunks, chunk = n % kChunks;
                const bool exists =
                    pixel / 8 < tile.rows && pixel % 8 < tile.columns && channel + chunk * 8 < grid.channels;
                line[i] = make_uint4(0, 0, 0, 0);
                if (exists) {
                    line[i] = load_global(reinterpret_cast<const uint4*>(
                        from + pixel / 8 * at.row_pitch + pixel % 8 * at.pixel_pitch + chunk * 8));
                }
            }
#pragma unroll
            for (int i = 0; i < kChunks / 2; ++i) {
                const uint32_t n = i * 32 + tile.lane;
                store_shared(gemm::staged(tile.staging, n / kChunks, n % kChunks), line[i]);
            }
            warp_sync();
#pragma unroll
            for (int j = 0; j < kPass / 16; ++j) {
                uint32_t m[4];
                ldmatrix_x4(gemm::staged(tile.staging, tile.lane % 16, 2 * j + tile.lane / 16), m);
                float* v = acc + pass * kPass / 2 + j * 8;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t sum =
                        pack_bf16x2(v[2 * i] + low_bf16(m[i]), v[2 * i + 1] + high_bf16(m[i]));
                    v[2 * i] = low_bf16(sum);
                    v[2 * i + 1] = high_bf16(sum);
                }
            }
            warp_sync();
        }
    }

    template <int kN>
    HOPPER_INLINE void store(const Grid& grid, const float (&acc)[kN / 2], const PixelTile& tile,
                             const Frames& to, const float (&scale)[2], Activation act) const {
        constexpr int kPass = kN < gemm::kStagedColumns ? kN : gemm::kStagedColumns;
        const PixelAddress at = address_of(grid, place, tile, to.frames);
        const gemm::WarpTile staging{0, 0, 0, 0, tile.staging, tile.lane};
#pragma unroll
        for (int pass = 0; pass < kN / kPass; ++pass) {
#pragma unroll
            for (int j = 0; j < kPass / 16; ++j) {
                const float* v = acc + pass * kPass / 2 + j * 8;
                gemm::stage_columns(staging, j, activate(v[0] * scale[0], v[1] * scale[0], act),
                                    activate(v[2] * scale[1], v[3] * scale[1], act),
                                    activate(v[4] * scale[0], v[5] * scale[0], act),
                                    activate(v[6] * scale[1], v[7] * scale[1], act));
            }
            const int channel = tile.channel + pass * kPass;
            store_pixels<kPass>(tile, to.data + at.first + channel, at, grid.channels - channel);
        }
    }

    // The staged pixels to memory; `channels`: how many exist from the first staged one on, a multiple of 8.
    template <int kColumns>
    HOPPER_INLINE static void store_pixels(const PixelTile& tile, bf16* to, const PixelAddress& at,
                                           int channels) {
        constexpr uint32_t kChunks = kColumns / 8, kRounds = 16 * kChunks / 32;
        warp_sync();
        uint4 line[kRounds];
#pragma unroll
        for (uint32_t i = 0; i < kRounds; ++i) {
            const uint32_t n = i * 32 + tile.lane;
            line[i] = load_shared<uint4>(gemm::staged(tile.staging, n / kChunks, n % kChunks));
        }
#pragma unroll
        for (uint32_t i = 0; i < kRounds; ++i) {
            const int n = static_cast<int>(i * 32 + tile.lane), pixel = n / kChunks, chunk = n % kChunks;
            if (pixel / 8 < tile.rows && pixel % 8 < tile.columns && chunk * 8 < channels) {
                store_global(reinterpret_cast<uint4*>(to + pixel / 8 * at.row_pitch +
                                                      pixel % 8 * at.pixel_pitch + chunk * 8),
                             line[i]);
            }
        }
        warp_sync();
    }
};

}  // namespace magihuman::conv
