// Tests of the simulator: a list of named functions, run by main() in harness.cpp.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "hopper/launch.h"
#include "hopper/numeric.h"
#include "sim/tests/kernels.cuh"

namespace magihuman::tests {

struct Test {
    const char* name;
    void (*body)();
};
std::vector<Test>& all_tests();

struct Register {
    Register(const char* name, void (*body)()) { all_tests().push_back({name, body}); }
};
#define SIM_TEST(name)                                   \
    static void name();                                  \
    static const Register register_##name(#name, &name); \
    static void name()

inline void expect(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

// Memory on 128-byte boundaries, registered with the simulator while it lives.
template <typename T>
class Buffer {
  public:
    Buffer(size_t count, const char* name, T fill = T{})
        : storage_(count + 128 / sizeof(T), fill), count_(count) {
        sim::register_global(data(), count * sizeof(T), name);
    }
    ~Buffer() { sim::clear_globals(); }
    Buffer(const Buffer&) = delete;
    T* data() {
        const auto address = reinterpret_cast<uintptr_t>(storage_.data());
        return reinterpret_cast<T*>((address + 127) & ~uintptr_t{127});
    }
    T& operator[](size_t i) { return data()[i]; }
    size_t size() const { return count_; }
    T* begin() { return data(); }
    T* end() { return data() + count_; }

  private:
    std::vector<T> storage_;
    size_t count_;
};

inline void fill_normal(Buffer<bf16>& buffer, uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (bf16& value : buffer) value = to_bf16(normal(generator));
}

// Runs `body` and returns the simulator's error; fails if there was none.
inline sim::Error error_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const sim::Error& error) {
        return error;
    }
    throw std::runtime_error("the simulator found no error");
}

inline void expect_contains(const std::string& text, const std::string& part) {
    expect(text.find(part) != std::string::npos, "\"" + text + "\" does not contain \"" + part + "\"");
}

}  // namespace magihuman::tests
