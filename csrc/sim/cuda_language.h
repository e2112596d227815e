// The part of the CUDA language that kernels use, for a host compiler.
// There is no __shared__: a static variable would be shared by all blocks of a cluster.
#pragma once

#include <cmath>
#include <cstdint>

#define __global__
#define __host__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;

// CUDA offers these unqualified in device code.
using std::fmaf;
template <typename T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
// CUDA's float overloads return the operand that is a number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace magihuman::sim {
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
}  // namespace magihuman::sim

#define threadIdx (::magihuman::sim::thread_index())
#define blockIdx (::magihuman::sim::block_index())
#define blockDim (::magihuman::sim::block_size())
#define gridDim (::magihuman::sim::grid_size())
