// Checks of launch parameters, the same wording everywhere: "operation: name: expected .., got ..".
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace magihuman {

class Arguments {
  public:
    explicit Arguments(const char* operation) : operation_(operation) {}

    void require(bool holds, const char* name, const char* expected, int64_t got) const {
        if (!holds) refuse(name, expected, std::to_string(got));
    }

    // A pointer that vector accesses of `alignment` bytes can use.
    void require_pointer(const void* pointer, const char* name, uint32_t alignment) const {
        const auto address = reinterpret_cast<uintptr_t>(pointer);
        if (address == 0 || address % alignment != 0) {
            const std::string expected = "an address that is a multiple of " + std::to_string(alignment);
            refuse(name, expected.c_str(), address == 0 ? "null" : std::to_string(address));
        }
    }

  private:
    [[noreturn]] void refuse(const char* name, const char* expected, const std::string& got) const {
        throw std::invalid_argument(std::string(operation_) + ": " + name + ": expected " + expected +
                                    ", got " + got);
    }

    const char* operation_;
};

}  // namespace magihuman
