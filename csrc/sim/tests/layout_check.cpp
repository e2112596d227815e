// Holds the simulator's reading of descriptors and register fragments against CUTLASS's canonical layouts.
#include <fstream>
#include <sstream>

#include "sim/tensor_core.h"
#include "sim/tests/harness.h"

namespace magihuman::tests {

namespace {

struct Hash {
    uint64_t value = 14695981039346656037ull;
    void add(int number) { value = (value ^ static_cast<uint32_t>(number)) * 1099511628211ull; }
};

void check_operand(std::istringstream& line) {
    int mn_major, rows, start;
    uint64_t descriptor;
    line >> mn_major >> rows >> start >> descriptor;
    static sim::SharedMemory memory;
    memory.reset(64 * 1024);
    const bool a = rows == 64;
    descriptor += (sim::SharedMemory::kWindowStart + start) >> 4;
    sim::WgmmaForm form{rows, false, false, true, false, 0, 0};
    (a ? form.a : form.b) = descriptor;
    (a ? form.a_mn_major : form.b_mn_major) = mn_major != 0;
    const std::vector<uint32_t> chunks = sim::operand_chunks(form, a, memory);
    Hash hash;
    for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < 16; ++k) {
            hash.add(mn_major != 0 ? chunks[k * (rows / 8) + row / 8] + row % 8 * 2
                                   : chunks[row * 2 + k / 8] + k % 8 * 2);
        }
    }
    uint64_t expected;
    line >> expected;
    expect(hash.value == expected, "the elements lie elsewhere");
}

template <typename PlaceOf>
void check_registers(std::istringstream& line, int per_thread, PlaceOf place_of) {
    Hash hash;
    for (int t = 0; t < 128; ++t) {
        for (int i = 0; i < per_thread; ++i) {
            const sim::Place place = place_of(t, i);
            hash.add(place.row + 64 * place.column);
        }
    }
    uint64_t expected;
    line >> expected;
    expect(hash.value == expected, "the registers hold other elements");
}

}  // namespace

int check_layouts(const char* path) {
    std::ifstream file(path);
    int checked = 0;
    for (std::string text; std::getline(file, text);) {
        std::istringstream line(text);
        std::string kind;
        line >> kind;
        try {
            if (kind == "operand") {
                check_operand(line);
            } else if (kind == "accumulator") {
                int columns = 0;
                line >> columns;
                check_registers(line, columns / 2, sim::accumulator_place);
            } else if (kind == "registers") {
                check_registers(line, 8, sim::a_register_place);
            } else {
                continue;
            }
            expect(!line.fail(), "the line is too short");
        } catch (const std::exception& error) {
            std::printf("%.60s..: %s\n", text.c_str(), error.what());
            return 1;
        }
        ++checked;
    }
    std::printf("%d layouts agree\n", checked);
    return checked > 0 ? 0 : 1;
}

}  // namespace magihuman::tests
