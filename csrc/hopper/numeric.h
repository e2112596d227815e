// Narrow number formats and the fast approximate functions of the special-function unit.
// All conversions round to nearest even.
#pragma once

#include "hopper/device.h"

#if defined(MAGIHUMAN_SIM)
#include "sim/numeric.h"
#endif

namespace magihuman {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

HOPPER_INLINE float float_from_bits(uint32_t bits) {
#if defined(MAGIHUMAN_SIM)
    return sim::bit_cast<float>(bits);
#else
    return __uint_as_float(bits);
#endif
}

HOPPER_INLINE uint32_t bits_of(float value) {
#if defined(MAGIHUMAN_SIM)
    return sim::bit_cast<uint32_t>(value);
#else
    return __float_as_uint(value);
#endif
}

HOPPER_INLINE float to_float(bf16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

HOPPER_INLINE float to_float(fp16 value) {
#if defined(MAGIHUMAN_SIM)
    return sim::fp16_to_float(value.bits);
#else
    return __half2float(__ushort_as_half(value.bits));
#endif
}

HOPPER_INLINE bf16 to_bf16(float value) {
#if defined(MAGIHUMAN_SIM)
    return {sim::bf16_from_float(value)};
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}

HOPPER_INLINE fp16 to_fp16(float value) {
#if defined(MAGIHUMAN_SIM)
    return {sim::fp16_from_float(value)};
#else
    return {__half_as_ushort(__float2half_rn(value))};
#endif
}

// Two values in one register, `low` in the lower half, which is the smaller address and the smaller column.
HOPPER_INLINE uint32_t pack_bf16x2(float low, float high) {
#if defined(MAGIHUMAN_SIM)
    return sim::bf16_from_float(low) | uint32_t{sim::bf16_from_float(high)} << 16;
#else
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

HOPPER_INLINE float low_bf16(uint32_t packed) { return float_from_bits(packed << 16); }
HOPPER_INLINE float high_bf16(uint32_t packed) { return float_from_bits(packed & 0xffff0000u); }

// 2^x, relative error about 2^-22. Results that would be subnormal flush to zero.
HOPPER_INLINE float fast_exp2(float x) {
#if defined(MAGIHUMAN_SIM)
    return sim::exp2_flushed(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

HOPPER_INLINE float fast_reciprocal(float x) {
#if defined(MAGIHUMAN_SIM)
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

HOPPER_INLINE float fast_rsqrt(float x) {
#if defined(MAGIHUMAN_SIM)
    return sim::rsqrt(x);
#else
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / (1 + e^-x). Saturates cleanly: e^-x of infinity gives 0.
HOPPER_INLINE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-1.4426950408889634f * x)); }

}  // namespace magihuman
