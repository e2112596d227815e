// simulator_tests --list | simulator_tests <name>..: runs the named tests, or all.
// simulator_tests --layouts <file>: holds the tensor core against the output of canonical_layouts.cu.
#include "sim/tests/harness.h"

#include <chrono>
#include <cstring>

namespace magihuman::tests {
std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}
int check_layouts(const char* path);
}  // namespace magihuman::tests

int main(int argc, char** argv) {
    using namespace magihuman;
    if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
        for (const auto& test : tests::all_tests()) std::puts(test.name);
        return 0;
    }
    if (argc == 3 && std::strcmp(argv[1], "--layouts") == 0) return tests::check_layouts(argv[2]);
    int failed = 0, ran = 0;
    for (const auto& test : tests::all_tests()) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], test.name) == 0;
        if (!wanted) continue;
        ++ran;
        const auto start = std::chrono::steady_clock::now();
        std::string outcome = "ok";
        try {
            test.body();
        } catch (const std::exception& error) {
            outcome = std::string("FAILED: ") + error.what();
            ++failed;
        }
        sim::clear_globals();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%s: %s (%.2f s)\n", test.name, outcome.c_str(), seconds.count());
    }
    if (ran == 0) std::puts("no such test");
    return failed == 0 && ran > 0 ? 0 : 1;
}
