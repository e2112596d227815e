// The last convolution: its 12 channels are 2 x 2 pixels of red, green and blue, channel rgb 4 + pw 2 + ph.
//   y = bf16(product + bias)
//   frames [count][2 H][2 W][3] = uint8(clamp(y / 2 + 1/2, 0, 1) 255), truncated, or
//   picture [3][count][2 H][2 W] = y as float32
// Frames: a warp's 16 pixels become bytes in its staging area, 16 bytes each; then eight lanes write one row of
// the picture, six bytes each.
#pragma once

#include "conv/pixel_tiles.cuh"
#include "gemm/epilogue_store.cuh"

namespace magihuman::conv {

constexpr int kPatch = 2, kColors = 3, kPatchChannels = kColors * kPatch * kPatch;

struct PictureEpilogue {
    const float* bias;  // [12]
    uint8_t* frames;    // null: picture
    float* picture;
    int count;  // frames written: those from grid.first on

    template <int kN>
    HOPPER_INLINE void prefetch(const Grid&, const PixelTile&) const {}

    template <int kN>
    HOPPER_INLINE void operator()(const Grid& grid, const float (&acc)[kN / 2], const PixelTile& tile) const {
        static_assert(kN == 16);
        const int lane = static_cast<int>(tile.lane), column = lane / 4, pair = lane % 4 * 2;
        const int64_t height = int64_t{grid.height} * kPatch, width = int64_t{grid.width} * kPatch;
        const int t = tile.t - grid.first;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int channel = 8 * j + pair;  // and the next one: ph 0 and 1 of one colour and pw
                if (channel >= kPatchChannels) continue;
                const float y[2] = {value(acc[4 * j + 2 * half], channel),
                                    value(acc[4 * j + 2 * half + 1], channel + 1)};
                if (frames != nullptr) {
                    const auto levels =
                        static_cast<uint16_t>(level(y[0]) | static_cast<uint32_t>(level(y[1])) << 8);
                    store_shared(tile.staging + (half * 8 + column) * 16 + channel, levels);
                } else if (half < tile.rows && column < tile.columns) {
                    const int color = channel / 4, pw = channel / 2 % 2;
                    float* to = picture +
                                ((int64_t{color} * count + t) * height + (tile.y + half) * kPatch) * width +
                                (tile.x + column) * kPatch + pw;
                    store_global(to, y[0]);
                    store_global(to + width, y[1]);
                }
            }
        }
        if (frames == nullptr) return;
        warp_sync();
        const int row = lane / 16, ph = lane / 8 % 2, x = lane % 8;
        const auto bytes = load_shared<uint4>(tile.staging + (row * 8 + x) * 16);
        if (row < tile.rows && x < tile.columns) {
            // One word is one colour: bytes (pw 0, ph 0), (pw 0, ph 1), (pw 1, ph 0), (pw 1, ph 1).
            const uint32_t red = bytes.x >> 8 * ph, green = bytes.y >> 8 * ph, blue = bytes.z >> 8 * ph;
            uint8_t* to =
                frames +
                ((t * height + (tile.y + row) * kPatch + ph) * width + (tile.x + x) * kPatch) * kColors;
            auto* words = reinterpret_cast<uint16_t*>(to);
            store_global(words, join(red, green));
            store_global(words + 1, join(blue, red >> 16));
            store_global(words + 2, join(green >> 16, blue >> 16));
        }
        warp_sync();
    }

  private:
    HOPPER_INLINE float value(float product, int channel) const {
        return to_float(to_bf16(product + load_global_constant(bias + channel)));
    }
    // Comparisons that NaN fails: it becomes 0.
    HOPPER_INLINE static uint8_t level(float y) {
        const float share = y * 0.5f + 0.5f;
        return static_cast<uint8_t>((share > 0.0f ? share < 1.0f ? share : 1.0f : 0.0f) * 255.0f);
    }
    HOPPER_INLINE static uint16_t join(uint32_t low, uint32_t high) {
        return static_cast<uint16_t>((low & 0xff) | (high & 0xff) << 8);
    }
};

}  // namespace magihuman::conv
