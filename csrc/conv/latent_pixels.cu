// latent_pixels: pixels [count][H][W][C] = bf16(latent std + mean) from latent float32 [C][frames][H][W]: what the
// first convolution reads. A frame beyond the last one is the last one: the padding of a clip's last window.
//
// A thread takes 8 channels of one pixel; neighbouring threads take neighbouring pixels, so that reads are whole
// lines and writes 16 bytes. A few megabytes: bound by its launch.
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "hopper/memory.h"
#include "hopper/numeric.h"

namespace magihuman {
namespace {

constexpr int kThreads = 256, kVector = 8;
constexpr uint32_t kBlocksPerProcessor = 4;

__global__ void __launch_bounds__(kThreads) latent_pixels_sm90(const __grid_constant__ LatentPixelsParams p) {
    role("pixels");
    const int64_t area = int64_t{p.height} * p.width, pixels = area * p.count;
    const int64_t total = pixels * (p.channels / kVector);
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
         i += int64_t{gridDim.x} * kThreads) {
        const int channel = static_cast<int>(i / pixels) * kVector;
        const int64_t pixel = i % pixels;
        const int64_t frame = min(static_cast<int>(pixel / area) + p.first, p.frames - 1);
        const float* from = p.latent + (channel * int64_t{p.frames} + frame) * area + pixel % area;
        uint32_t pair[kVector / 2];
#pragma unroll
        for (int c = 0; c < kVector; c += 2) {
            float value[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                value[k] = load_global_constant(from + (c + k) * p.frames * area) *
                               load_global_constant(p.std + channel + c + k) +
                           load_global_constant(p.mean + channel + c + k);
            }
            pair[c / 2] = pack_bf16x2(value[0], value[1]);
        }
        store_global(reinterpret_cast<uint4*>(static_cast<bf16*>(p.pixels) + pixel * p.channels + channel),
                     make_uint4(pair[0], pair[1], pair[2], pair[3]));
    }
}

}  // namespace

void launch_latent_pixels(const LatentPixelsParams& p, Stream stream) {
    const Arguments check("latent_pixels");
    check.require_pointer(p.latent, "latent", 4);
    check.require_pointer(p.mean, "mean", 4);
    check.require_pointer(p.std, "std", 4);
    check.require_pointer(p.pixels, "pixels", 16);
    check.require(p.channels >= kVector && p.channels % kVector == 0, "channels", "a multiple of 8",
                  p.channels);
    check.require(p.frames >= 1, "frames", "at least 1", p.frames);
    check.require(p.height >= 1, "height", "at least 1", p.height);
    check.require(p.width >= 1, "width", "at least 1", p.width);
    check.require(p.first >= 0 && p.first < p.frames, "first", "a frame of the latent", p.first);
    check.require(p.count >= 1, "count", "at least 1", p.count);
    check.require(p.num_sms >= 0, "num_sms", "0 or more", p.num_sms);
    const int64_t total = int64_t{p.count} * p.height * p.width * (p.channels / kVector);
    const auto most = static_cast<int64_t>(processors(p.num_sms) * kBlocksPerProcessor);
    const auto blocks = static_cast<uint32_t>(std::min((total + kThreads - 1) / kThreads, most));
    launch(latent_pixels_sm90, {"latent_pixels_sm90", dim3(blocks), kThreads, 1, 0, stream}, p);
}

}  // namespace magihuman
