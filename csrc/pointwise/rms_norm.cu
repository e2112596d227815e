// rms_norm: out = bf16(x rsqrt(mean(x^2) + eps) (1 + weight)), x float32 [M, H], weight [groups, H] by modality.
//
// Bound by memory: 4 H bytes in and 2 H out per row, each touched once. A block of 128 threads holds one row in
// registers, so a row costs one barrier; blocks are many per multiprocessor and hide each other's latency.
// Persistent: the number of live rows comes from device memory.
//
// Shared memory: partial sums [2][4], one per warp; two copies, so that one barrier per row is enough.
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "hopper/device.h"
#include "hopper/launch.h"
#include "hopper/memory.h"
#include "hopper/numeric.h"
#include "hopper/sync.h"
#include "hopper/warp.h"

namespace magihuman {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kMaxWidth = 5120;
constexpr uint32_t kSharedBytes = 2 * kWarps * sizeof(float);
// 40 values and little else in registers: 10 blocks fit a multiprocessor, and 8 keep 160 KB under way.
constexpr uint32_t kBlocksPerProcessor = 8;

template <int kVectors>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    rms_norm_sm90(const __grid_constant__ RmsNormParams p) {
    role("row");
    const int thread = static_cast<int>(threadIdx.x);
    auto* partial = reinterpret_cast<float*>(dynamic_shared_memory());
    const ModalityRanges ranges = load_ranges(p.modality_offsets, p.m);
    int copy = 0;
    for (int row = static_cast<int>(blockIdx.x); row < ranges.rows; row += static_cast<int>(gridDim.x)) {
        // x is next read by the residual addition, after far more than L2 holds; out is read by the very next
        // product. So x leaves L2 first.
        const float* x = p.x + row * p.ldx;
        float4 value[kVectors];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = (i * kThreads + thread) * 4;
            value[i] = column < p.h ? load_global_streaming(reinterpret_cast<const float4*>(x + column))
                                    : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const float4 v = value[i];
            sum += fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
        }
#pragma unroll
        for (uint32_t mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane_id() == 0) store_shared(partial + copy * kWarps + thread / 32, sum);
        block_sync();
        const float4 sums = load_shared<float4>(partial + copy * kWarps);
        copy ^= 1;
        const float mean = ((sums.x + sums.y) + (sums.z + sums.w)) / static_cast<float>(p.h);
        const float scale = fast_rsqrt(mean + p.eps);

        const float* weight = p.weight + (p.groups == 1 ? 0 : ranges.group_of(row)) * int64_t{p.h};
        auto* out = static_cast<bf16*>(p.out) + row * p.ldout;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = (i * kThreads + thread) * 4;
            if (column >= p.h) continue;
            const float4 w = load_global_constant(reinterpret_cast<const float4*>(weight + column));
            const float4 v = value[i];
            const uint2 packed = make_uint2(pack_bf16x2(v.x * scale * (1 + w.x), v.y * scale * (1 + w.y)),
                                            pack_bf16x2(v.z * scale * (1 + w.z), v.w * scale * (1 + w.w)));
            store_global(reinterpret_cast<uint2*>(out + column), packed);
        }
    }
}

}  // namespace

void launch_rms_norm(const RmsNormParams& p, Stream stream) {
    const Arguments check("rms_norm");
    check.require(p.m >= 0, "m", "at least 0", p.m);
    check.require(p.h >= 8 && p.h <= kMaxWidth && p.h % 8 == 0, "h", "a multiple of 8 from 8 to 5120", p.h);
    check.require(p.groups == 1 || p.groups == 3, "groups", "1 or 3", p.groups);
    check.require(p.ldx >= p.h && p.ldx % 4 == 0, "ldx", "a multiple of 4, at least h", p.ldx);
    check.require(p.ldout >= p.h && p.ldout % 4 == 0, "ldout", "a multiple of 4, at least h", p.ldout);
    check.require_pointer(p.x, "x", 16);
    check.require_pointer(p.weight, "weight", 16);
    check.require_pointer(p.out, "out", 8);
    if (p.groups == 3 || p.modality_offsets != nullptr) {
        check.require_pointer(p.modality_offsets, "modality_offsets", 4);
    }
    if (p.m == 0) return;
    const uint32_t blocks = processors(p.num_sms) * kBlocksPerProcessor;
    const LaunchConfig config{"rms_norm_sm90", dim3(std::min(blocks, static_cast<uint32_t>(p.m))),
                              kThreads,        1,
                              kSharedBytes,    stream};
    p.h <= 8 * kThreads ? launch(rms_norm_sm90<2>, config, p) : launch(rms_norm_sm90<10>, config, p);
}

}  // namespace magihuman
