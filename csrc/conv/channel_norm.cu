// channel_norm: normed = bf16(act(bf16(x / rms(x)))), plain = bf16(x / rms(x)) over the channels of each pixel, for
// pixels of too many channels for one convolution tile (512).
//
// Bound by memory: 2 C bytes in and 2 C or 4 C out per pixel. A warp holds kPixels pixels in registers, 16 bytes a
// lane and load, before it reduces the first; no shared memory, no barrier. Each pixel is read whole before it is
// written, so x and normed may be one buffer.
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "conv/epilogue_pixels.cuh"
#include "hopper/launch.h"

namespace magihuman {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPixels = 4, kVectors = 2,
              kMostChannels = 8 * 32 * kVectors;
constexpr uint32_t kBlocksPerProcessor = 4;

struct Pixels {
    int area, first, channels;
    // The element of channel 0 of pixel `i` of those that are computed.
    HOPPER_INLINE int64_t at(int i, int frames) const {
        const int frame = i / area;
        return (int64_t{(first + frame) % frames} * area + (i - frame * area)) * channels;
    }
};

HOPPER_INLINE uint32_t scaled(uint32_t pair, float scale, conv::Activation act) {
    return conv::activate(low_bf16(pair) * scale, high_bf16(pair) * scale, act);
}
HOPPER_INLINE uint4 scaled(uint4 v, float scale, conv::Activation act) {
    return make_uint4(scaled(v.x, scale, act), scaled(v.y, scale, act), scaled(v.z, scale, act),
                      scaled(v.w, scale, act));
}
HOPPER_INLINE float squares(uint32_t pair) {
    const float a = low_bf16(pair), b = high_bf16(pair);
    return a * a + b * b;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    channel_norm_sm90(const __grid_constant__ ChannelNormParams p) {
    role("pixels");
    const int count = p.count * p.height * p.width, lane = static_cast<int>(lane_id());
    const Pixels pixels{p.height * p.width, p.first, p.channels};
    const auto* x = static_cast<const bf16*>(p.x.data);
    const int warps = static_cast<int>(gridDim.x) * kWarps;
    for (int group = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(warp_id());
         group < (count + kPixels - 1) / kPixels; group += warps) {
        uint4 value[kPixels][kVectors];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            const int pixel = group * kPixels + i;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int channel = (v * 32 + lane) * 8;
                value[i][v] = pixel < count && channel < p.channels
                                  ? load_global(reinterpret_cast<const uint4*>(
                                        x + pixels.at(pixel, p.x.frames) + channel))
                                  : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            const int pixel = group * kPixels + i;
            float sum = 0;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const uint4 u = value[i][v];
                sum += squares(u.x) + squares(u.y) + squares(u.z) + squares(u.w);
            }
#pragma unroll
            for (uint32_t mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            if (pixel >= count) continue;
            const float mean = sum / static_cast<float>(p.channels);
            const float scale = fast_rsqrt(mean + p.eps), plain_scale = fast_rsqrt(mean + p.plain_eps);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int channel = (v * 32 + lane) * 8;
                if (channel >= p.channels) continue;
                auto* normed =
                    static_cast<bf16*>(p.normed.data) + pixels.at(pixel, p.normed.frames) + channel;
                store_global(reinterpret_cast<uint4*>(normed),
                             scaled(value[i][v], scale, static_cast<conv::Activation>(p.activation)));
                if (p.plain.data == nullptr) continue;
                auto* plain = static_cast<bf16*>(p.plain.data) + pixels.at(pixel, p.plain.frames) + channel;
                store_global(reinterpret_cast<uint4*>(plain),
                             scaled(value[i][v], plain_scale, conv::Activation::kNone));
            }
        }
    }
}

}  // namespace

void launch_channel_norm(const ChannelNormParams& p, Stream stream) {
    const Arguments check("channel_norm");
    check.require_pointer(p.x.data, "x", 16);
    check.require_pointer(p.normed.data, "normed", 16);
    check.require(p.x.frames >= 1, "x", "at least 1 frame", p.x.frames);
    check.require(p.normed.frames >= 1, "normed", "at least 1 frame", p.normed.frames);
    if (p.plain.data != nullptr) {
        check.require_pointer(p.plain.data, "plain", 16);
        check.require(p.plain.frames >= 1, "plain", "at least 1 frame", p.plain.frames);
    }
    check.require(p.channels >= 8 && p.channels <= kMostChannels && p.channels % 8 == 0, "channels",
                  "a multiple of 8 from 8 to 512", p.channels);
    check.require(p.height >= 1, "height", "at least 1", p.height);
    check.require(p.width >= 1, "width", "at least 1", p.width);
    check.require(p.first >= 0, "first", "0 or more", p.first);
    check.require(p.count >= 1, "count", "at least 1", p.count);
    const int64_t pixels = int64_t{p.count} * p.height * p.width;
    check.require(pixels < 1ll << 31, "count", "fewer than 2^31 pixels", pixels);
    check.require(p.activation >= 0 && p.activation <= 2, "activation", "0 to 2", p.activation);
    check.require(p.num_sms >= 0, "num_sms", "0 or more", p.num_sms);
    const int64_t blocks = (pixels + kPixels * kWarps - 1) / (kPixels * kWarps);
    const auto most = static_cast<int64_t>(processors(p.num_sms) * kBlocksPerProcessor);
    launch(channel_norm_sm90,
           {"channel_norm_sm90", dim3(static_cast<uint32_t>(std::min(blocks, most))), kThreads, 1, 0, stream},
           p);
}

}  // namespace magihuman
