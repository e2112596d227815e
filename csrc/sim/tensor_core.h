// What a tensor core reads for a matrix descriptor, and what it computes.
#pragma once

#include "sim/instructions.h"
#include "sim/shared_memory.h"

namespace magihuman::sim {

// Shared-memory offsets of the 16-byte chunks of operand A or B, found by decoding the descriptor's 64 bits.
// K-major: [row][2], each chunk a stretch of K of one row of A (column of B).
// MN-major: [k][rows / 8], each chunk eight rows at one k.
std::vector<uint32_t> operand_chunks(const WgmmaForm& form, bool a, const SharedMemory& memory);

// Where the elements lie that thread `t` (0..127) of a warpgroup holds in registers.
struct Place {
    int row, column;
};
constexpr Place accumulator_place(int t, int index) {
    return {16 * (t / 32) + t % 32 / 4 + index / 2 % 2 * 8, index / 4 * 8 + t % 4 * 2 + index % 2};
}
// Element `index` of A, in memory order through the thread's four registers; `column` is k.
constexpr Place a_register_place(int t, int index) {
    const int r = index / 2;
    return {16 * (t / 32) + t % 32 / 4 + r % 2 * 8, 2 * (t % 4 + r / 2 * 4) + index % 2};
}

// tile[64][n] (+)= A B, in float32. A from chunks, or, where a_registers is not empty, from [128][4]
// registers.
void multiply(const WgmmaForm& form, const uint8_t* shared, const std::vector<uint32_t>& a_chunks,
              const std::vector<uint32_t>& b_chunks, const std::vector<uint32_t>& a_registers, float* tile);

}  // namespace magihuman::sim
