// For test libraries that Python calls through ctypes: text goes into a buffer of the caller's, exceptions become text.
#pragma once

#include <cstring>
#include <exception>
#include <string>

namespace magihuman::sim {

constexpr size_t kTextBytes = 2048;  // of every such buffer

inline void write_text(char* to, const std::string& text) {
    std::strncpy(to, text.c_str(), kTextBytes - 1);
    to[kTextBytes - 1] = 0;
}

// 0, or 1 with the message in `error`.
template <typename Body>
int guarded(char* error, const Body& body) {
    std::string message;
    try {
        body();
        return 0;
    } catch (const std::exception& failure) {
        message = failure.what();
    }
    write_text(error, message);
    return 1;
}

}  // namespace magihuman::sim
