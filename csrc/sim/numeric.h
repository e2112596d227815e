// Number formats in plain arithmetic, for any host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace magihuman::sim {

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float bf16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t bf16_from_float(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // what cvt gives for every NaN
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Round to nearest even to a format with `mantissa` stored bits whose smallest normal number is
// 2^min_exponent.
inline double round_to_format(double value, int mantissa, int min_exponent) {
    if (value == 0 || !std::isfinite(value)) return value;
    int exponent;
    std::frexp(value, &exponent);
    const int quantum = (exponent - 1 < min_exponent ? min_exponent : exponent - 1) - mantissa;
    return std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
}

inline float fp16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa != 0 ? NAN : INFINITY;
    return static_cast<float>(bits & 0x8000 ? -value : value);
}

inline uint16_t fp16_from_float(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double rounded = std::fabs(round_to_format(value, 10, -14));
    if (rounded > 65504) return sign | 0x7c00;
    if (rounded < std::ldexp(1, -14)) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
    int exponent;
    const double fraction = std::frexp(rounded, &exponent);  // in [1/2, 1)
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 |
                                 (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}

inline float exp2_flushed(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

}  // namespace magihuman::sim
