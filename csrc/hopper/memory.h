// Ordinary loads and stores of 2, 4, 8 or 16 bytes, as kernels should write them: the simulator checks
// bounds, alignment and ordering of every access that goes through here. Data that TMA or WGMMA reads or
// writes must be touched through these (or stmatrix/ldmatrix); plain pointers are for values that no async
// proxy ever sees.
#pragma once

#include "hopper/device.h"

namespace magihuman {

#if !defined(MAGIHUMAN_SIM)
namespace memory_words {

// The register form of each access size, for instructions that want exactly that.
template <size_t kBytes>
struct Word;
template <>
struct Word<4> {
    using type = unsigned int;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

template <typename To, typename From>
HOPPER_INLINE To reinterpret(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace memory_words
#endif

template <typename T>
HOPPER_INLINE T load_global(const T* address) {
#if defined(MAGIHUMAN_SIM)
    return sim::load_global(address);
#else
    return *address;
#endif
}

// Data that no thread writes during the kernel: the read-only path.
template <typename T>
HOPPER_INLINE T load_global_constant(const T* address) {
#if defined(MAGIHUMAN_SIM)
    return sim::load_global(address);
#else
    using Word = typename memory_words::Word<sizeof(T)>::type;
    return memory_words::reinterpret<T>(__ldg(reinterpret_cast<const Word*>(address)));
#endif
}

// Data that is read once: first to leave the caches.
template <typename T>
HOPPER_INLINE T load_global_streaming(const T* address) {
#if defined(MAGIHUMAN_SIM)
    return sim::load_global(address);
#else
    using Word = typename memory_words::Word<sizeof(T)>::type;
    return memory_words::reinterpret<T>(__ldcs(reinterpret_cast<const Word*>(address)));
#endif
}

// Words of 8 and 16 bytes are spelt out: left to the compiler, a value that comes from registers one by one is
// stored word by word.
template <typename T>
HOPPER_INLINE void store_global(T* address, T value) {
#if defined(MAGIHUMAN_SIM)
    sim::store_global(address, value);
#else
    if constexpr (sizeof(T) == 8) {
        const auto word = memory_words::reinterpret<uint2>(value);
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(word.x), "r"(word.y) : "memory");
    } else if constexpr (sizeof(T) == 16) {
        const auto word = memory_words::reinterpret<uint4>(value);
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word.x), "r"(word.y),
                     "r"(word.z), "r"(word.w)
                     : "memory");
    } else {
        *address = value;
    }
#endif
}

template <typename T>
HOPPER_INLINE void store_global_streaming(T* address, T value) {
#if defined(MAGIHUMAN_SIM)
    sim::store_global(address, value);
#else
    using Word = typename memory_words::Word<sizeof(T)>::type;
    __stcs(reinterpret_cast<Word*>(address), memory_words::reinterpret<Word>(value));
#endif
}

template <typename T>
HOPPER_INLINE T atomic_add_global(T* address, T value) {
#if defined(MAGIHUMAN_SIM)
    const T before = sim::load_global(address);
    sim::store_global(address, static_cast<T>(before + value));
    return before;
#else
    return atomicAdd(address, value);
#endif
}

// Adds to one float, or two, where they lie: nothing comes back, and nobody waits.
HOPPER_INLINE void reduce_add_global(float* address, float value) {
#if defined(MAGIHUMAN_SIM)
    sim::store_global(address, sim::load_global(address) + value);
#else
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
#endif
}

HOPPER_INLINE void reduce_add_global(float2* address, float2 value) {
#if defined(MAGIHUMAN_SIM)
    const float2 before = sim::load_global(address);
    sim::store_global(address, make_float2(before.x + value.x, before.y + value.y));
#else
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(value.x),
                 "f"(value.y)
                 : "memory");
#endif
}

template <typename T>
HOPPER_INLINE T load_shared(const void* address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if defined(MAGIHUMAN_SIM)
    return sim::load_shared<T>(address);
#else
    const uint32_t from = shared_address(address);
    if constexpr (sizeof(T) == 2) {
        uint16_t word;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(word) : "r"(from) : "memory");
        return memory_words::reinterpret<T>(word);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
        return memory_words::reinterpret<T>(word);
    } else if constexpr (sizeof(T) == 8) {
        uint2 word;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "r"(from) : "memory");
        return memory_words::reinterpret<T>(word);
    } else {
        uint4 word;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                     : "r"(from)
                     : "memory");
        return memory_words::reinterpret<T>(word);
    }
#endif
}

template <typename T>
HOPPER_INLINE void store_shared(void* address, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if defined(MAGIHUMAN_SIM)
    sim::store_shared(address, value);
#else
    const uint32_t to = shared_address(address);
    if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(memory_words::reinterpret<uint16_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(memory_words::reinterpret<uint32_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 8) {
        const uint2 word = memory_words::reinterpret<uint2>(value);
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(word.x), "r"(word.y) : "memory");
    } else {
        const uint4 word = memory_words::reinterpret<uint4>(value);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word.x), "r"(word.y),
                     "r"(word.z), "r"(word.w)
                     : "memory");
    }
#endif
}

}  // namespace magihuman
