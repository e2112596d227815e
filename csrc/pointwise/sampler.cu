// The sampler's updates between two forwards, elementwise in float32 over latents of `count` elements.
//
// Bound by memory: 16-byte accesses, every array touched once, as many arrays under way per thread as the formula
// has. Step number, tables and noise are device data, so that one captured graph serves every step. The products
// and sums are written out as fused multiply-adds: the same bits on the device and in the simulator.
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "hopper/launch.h"
#include "hopper/memory.h"
#include "pointwise/latent_grid.h"

namespace magihuman {
namespace {

constexpr uint32_t kThreads = 256, kBlocksPerProcessor = 8;  // 2048 threads: all a multiprocessor holds

HOPPER_INLINE int64_t first_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
HOPPER_INLINE int64_t index_stride() { return int64_t{gridDim.x} * kThreads; }

HOPPER_INLINE float4 load_vector(const float* from, int64_t i) {
    return load_global(reinterpret_cast<const float4*>(from) + i);
}
HOPPER_INLINE void store_vector(float* to, int64_t i, float4 value) {
    store_global(reinterpret_cast<float4*>(to) + i, value);
}

// a b + c, element by element
HOPPER_INLINE float4 multiply_add(float a, float4 b, float4 c) {
    return make_float4(fmaf(a, b.x, c.x), fmaf(a, b.y, c.y), fmaf(a, b.z, c.z), fmaf(a, b.w, c.w));
}
HOPPER_INLINE float4 scaled(float a, float4 b) { return make_float4(a * b.x, a * b.y, a * b.z, a * b.w); }

__global__ void __launch_bounds__(kThreads) renoise_step_sm90(const __grid_constant__ RenoiseStepParams p) {
    role("renoise");
    const int step = load_global_constant(p.step);
    if (step < 0 || step >= p.steps) return;
    const float* row = p.table + 3 * step;
    const float sigma = load_global_constant(row), keep = load_global_constant(row + 1),
                renoise = load_global_constant(row + 2);
    const float* noise = p.noise + step * p.count;
    for (int64_t i = first_index(); i < p.count / 4; i += index_stride()) {
        const float4 x = load_vector(p.x, i), v = load_vector(p.velocity, i), fresh = load_vector(noise, i);
        store_vector(p.x, i, multiply_add(renoise, fresh, scaled(keep, multiply_add(-sigma, v, x))));
    }
}

__global__ void __launch_bounds__(kThreads) clamp_image_sm90(const __grid_constant__ ClampImageParams p) {
    role("clamp");
    const int64_t frame_vectors = p.grid.height * p.grid.width / 4;
    for (int64_t i = first_index(); i < p.grid.channels * frame_vectors; i += index_stride()) {
        const int64_t channel = i / frame_vectors;
        float* frame = p.video + channel * channel_stride(p.grid);
        store_vector(frame, i - channel * frame_vectors, load_vector(p.image, i));
    }
}

__global__ void __launch_bounds__(kThreads) unipc_step_sm90(const __grid_constant__ UnipcStepParams p) {
    role("unipc");
    const int step = load_global_constant(p.step);
    if (step < 0 || step >= p.steps) return;
    const float* row = p.table + 9 * step;
    const auto factor = [&](int i) { return load_global_constant(row + i); };
    const float sigma = factor(0), own = factor(1), last = factor(2), old = factor(3), prev = factor(4),
                fresh = factor(5), keep = factor(6), current = factor(7), previous = factor(8);
    // The row that receives m still holds m_older: each thread reads its elements before it writes them.
    float* m_row = p.history + step % 2 * p.count;
    const float* m_previous_row = p.history + (step + 1) % 2 * p.count;
    const bool reads_previous = prev != 0 || previous != 0;
    const auto frame_vectors = static_cast<uint32_t>(p.frame_size / 4);
    for (int64_t i = first_index(); i < p.count / 4; i += index_stride()) {
        const float4 zero = make_float4(0, 0, 0, 0);
        const float4 x = load_vector(p.x, i);
        float4 v = load_vector(p.velocity, i);
        const float4 x_last = last != 0 ? load_vector(p.x_last, i) : zero;
        const float4 m_older = old != 0 ? load_vector(m_row, i) : zero;
        const float4 m_previous = reads_previous ? load_vector(m_previous_row, i) : zero;
        if (p.null_velocity != nullptr) {
            const float4 base = load_vector(p.null_velocity, i);
            // Divided in 32 bits: in 64 it would cost as much as the loads.
            const uint32_t frame = static_cast<uint32_t>(i) / frame_vectors % static_cast<uint32_t>(p.frames);
            const float guidance = load_global_constant(p.guidance + step * p.frames + frame);
            v = multiply_add(guidance, make_float4(v.x - base.x, v.y - base.y, v.z - base.z, v.w - base.w),
                             base);
        }
        const float4 m = multiply_add(-sigma, v, x);
        float4 corrected = scaled(own, x);
        corrected = multiply_add(last, x_last, corrected);
        corrected = multiply_add(old, m_older, corrected);
        corrected = multiply_add(prev, m_previous, corrected);
        corrected = multiply_add(fresh, m, corrected);
        const float4 next =
            multiply_add(previous, m_previous, multiply_add(current, m, scaled(keep, corrected)));
        store_vector(p.x, i, next);
        store_vector(p.x_last, i, corrected);
        store_vector(m_row, i, m);
    }
}

__global__ void __launch_bounds__(32) advance_step_sm90(int* step) {
    role("advance");
    if (threadIdx.x == 0) store_global(step, load_global(step) + 1);
}

LaunchConfig elementwise(const char* kernel, int64_t count, int num_sms, Stream stream) {
    const int64_t blocks =
        std::min((count / 4 + kThreads - 1) / kThreads, int64_t{processors(num_sms)} * kBlocksPerProcessor);
    return {kernel, dim3(static_cast<uint32_t>(blocks)), kThreads, 1, 0, stream};
}

void check_update(const Arguments& check, int64_t count, int steps, const int* step) {
    check.require(count >= 0 && count % 4 == 0 && count < int64_t{1} << 34, "count",
                  "a multiple of 4 below 2^34", count);
    check.require(steps >= 1, "steps", "at least 1", steps);
    check.require_pointer(step, "step", 4);
}

}  // namespace

void launch_renoise_step(const RenoiseStepParams& p, Stream stream) {
    const Arguments check("renoise_step");
    check_update(check, p.count, p.steps, p.step);
    check.require_pointer(p.x, "x", 16);
    check.require_pointer(p.velocity, "velocity", 16);
    check.require_pointer(p.noise, "noise", 16);
    check.require_pointer(p.table, "table", 4);
    if (p.count == 0) return;
    launch(renoise_step_sm90, elementwise("renoise_step_sm90", p.count, p.num_sms, stream), p);
}

void launch_clamp_image(const ClampImageParams& p, Stream stream) {
    const Arguments check("clamp_image");
    check_grid(check, p.grid);
    check.require_pointer(p.video, "video", 16);
    check.require_pointer(p.image, "image", 16);
    const int64_t count = int64_t{p.grid.channels} * p.grid.height * p.grid.width;
    launch(clamp_image_sm90, elementwise("clamp_image_sm90", count, p.num_sms, stream), p);
}

void launch_unipc_step(const UnipcStepParams& p, Stream stream) {
    const Arguments check("unipc_step");
    check_update(check, p.count, p.steps, p.step);
    check.require_pointer(p.x, "x", 16);
    check.require_pointer(p.velocity, "velocity", 16);
    check.require_pointer(p.x_last, "x_last", 16);
    check.require_pointer(p.history, "history", 16);
    check.require_pointer(p.table, "table", 4);
    if (p.null_velocity != nullptr) {
        check.require_pointer(p.null_velocity, "null_velocity", 16);
        check.require_pointer(p.guidance, "guidance", 4);
        check.require(p.frames >= 1, "frames", "at least 1", p.frames);
        check.require(p.frame_size >= 4 && p.frame_size % 4 == 0 && p.frame_size < int64_t{1} << 34,
                      "frame_size", "a multiple of 4 from 4 to 2^34", p.frame_size);
    }
    if (p.count == 0) return;
    launch(unipc_step_sm90, elementwise("unipc_step_sm90", p.count, p.num_sms, stream), p);
}

void launch_advance_step(const AdvanceStepParams& p, Stream stream) {
    const Arguments check("advance_step");
    check.require_pointer(p.step, "step", 4);
    launch(advance_step_sm90, {"advance_step_sm90", dim3(1), 32, 1, 0, stream}, p.step);
}

}  // namespace magihuman
