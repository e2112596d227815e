#include "sim/tensor_core.h"

#include <algorithm>
#include <cstring>

#include "sim/machine.h"
#include "sim/numeric.h"

namespace magihuman::sim {

namespace {

struct Descriptor {
    uint32_t start, leading, stride;  // bytes
    Swizzle swizzle;
};

// Bit fields as in CUTLASS's GmmaDescriptor: 0-13 start, 16-29 leading dimension offset, 32-45 stride
// dimension offset, each in 16 bytes; 49-51 base offset; 62-63 swizzle: 0 none, 1: 128, 2: 64, 3: 32 bytes.
Descriptor decode(uint64_t bits, const char* operand) {
    constexpr uint64_t kUnused = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;
    if ((bits & kUnused) != 0) {
        fail("misaligned",
             text("descriptor of %s has unused bits set: 0x%016llx", operand, (unsigned long long)bits));
    }
    if ((bits >> 49 & 7) != 0) fail("misaligned", text("descriptor of %s has a base offset", operand));
    const auto field = [bits](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
    const uint32_t mode = bits >> 62;
    Descriptor d{field(0), field(16), field(32), mode == 0 ? Swizzle::kNone : static_cast<Swizzle>(4 - mode)};
    // Row bits (7 and up, below the period) in the start would shift the pattern, which needs a base offset.
    const uint32_t row_bits = (swizzle_period(d.swizzle) - 1) & ~uint32_t{127};
    if (d.swizzle != Swizzle::kNone && (d.start & row_bits) != 0) {
        fail("misaligned",
             text("descriptor of %s starts at shared address 0x%x, not on a %u-byte swizzle pattern", operand,
                  d.start, swizzle_period(d.swizzle)));
    }
    return d;
}

[[noreturn]] void fail_beyond(const char* operand, uint32_t address, const SharedMemory& memory) {
    fail("out of bounds",
         text("the descriptor of %s reaches shared address 0x%x; the block has %u bytes from "
              "0x%x on",
              operand, address, memory.size(), SharedMemory::kWindowStart));
}

}  // namespace

std::vector<uint32_t> operand_chunks(const WgmmaForm& form, bool a, const SharedMemory& memory) {
    const char* operand = a ? "A" : "B";
    const Descriptor d = decode(a ? form.a : form.b, operand);
    const uint32_t rows = a ? 64 : form.n;
    const uint32_t span = swizzle_span(d.swizzle);
    const bool plain = d.swizzle == Swizzle::kNone;
    std::vector<uint32_t> chunks(2 * rows);
    uint32_t* next = chunks.data();
    const auto add = [&](uint32_t address) {
        const uint32_t offset = swizzle_offset(address, d.swizzle) - SharedMemory::kWindowStart;
        if (address < SharedMemory::kWindowStart || offset + 16 > memory.size()) {
            fail_beyond(operand, address, memory);
        }
        *next++ = offset;
    };
    if (a ? form.a_mn_major : form.b_mn_major) {
        const uint32_t span_chunks = span / 16;
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t c = 0; c < rows / 8; ++c) {
                add(plain ? d.start + c * d.stride + k / 8 * d.leading + k % 8 * 16
                          : d.start + c / span_chunks * d.leading + c % span_chunks * 16 + k / 8 * d.stride +
                                k % 8 * span);
            }
        }
    } else {
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t c = 0; c < 2; ++c) {
                add(d.start + row / 8 * d.stride + row % 8 * span + c * (plain ? d.leading : 16));
            }
        }
    }
    return chunks;
}

namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4)));

constexpr int kK = 16, kPerChunk = 8, kRows = 64, kMaxColumns = 256;

float widen(const uint8_t* element) {
    uint16_t bits;
    std::memcpy(&bits, element, 2);
    return bf16_to_float(bits);
}

// The elements of a chunk, as floats `pitch` apart.
void unpack_chunk(const uint8_t* chunk, float* to, int pitch) {
    if (pitch == 1) {
#pragma GCC unroll 8
        for (int e = 0; e < kPerChunk; ++e) to[e] = widen(chunk + e * 2);
        return;
    }
#pragma GCC unroll 8
    for (int e = 0; e < kPerChunk; ++e) to[e * pitch] = widen(chunk + e * 2);
}

// An operand as float: element (row, k) goes to row * row_pitch + k * k_pitch.
void unpack(const uint8_t* shared, const std::vector<uint32_t>& chunks, int rows, bool mn_major, float* to,
            int row_pitch, int k_pitch) {
    const uint32_t* next = chunks.data();
    if (mn_major) {
        for (int k = 0; k < kK; ++k)
            for (int row = 0; row < rows; row += kPerChunk)
                unpack_chunk(shared + *next++, to + row * row_pitch + k * k_pitch, row_pitch);
    } else {
        for (int row = 0; row < rows; ++row)
            for (int k = 0; k < kK; k += kPerChunk)
                unpack_chunk(shared + *next++, to + row * row_pitch + k * k_pitch, k_pitch);
    }
}

// Four rows by kVectors vectors of columns, whose sums stay in registers. Each sum takes its products in the order of k.
template <int kVectors>
void multiply_block(const float* a, const float* b, int n, bool accumulate, float* tile) {
    constexpr int kLanes = 8, kBlockRows = 4;
    Vector sum[kBlockRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = accumulate ? *reinterpret_cast<const Vector*>(tile + r * n + v * kLanes) : Vector{};
        }
    }
    for (int k = 0; k < kK; ++k) {
        Vector right[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            right[v] = *reinterpret_cast<const Vector*>(b + k * n + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * kK + k] * right[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(tile + r * n + v * kLanes) = sum[r][v];
    }
}

}  // namespace

void multiply(const WgmmaForm& form, const uint8_t* shared, const std::vector<uint32_t>& a_chunks,
              const std::vector<uint32_t>& b_chunks, const std::vector<uint32_t>& a_registers, float* tile) {
    const int n = form.n;
    static float a[kRows * kK], b[kK * kMaxColumns];
    unpack(shared, b_chunks, n, form.b_mn_major, b, 1, n);
    if (form.a_in_registers) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(a_registers.data());
        for (int t = 0; t < 128; ++t) {
            for (int i = 0; i < 8; i += 2) {  // the next element is the next column's
                const Place place = a_register_place(t, i);
                float* to = a + place.row * kK + place.column;
                to[0] = widen(bytes + t * 16 + i * 2);
                to[1] = widen(bytes + t * 16 + i * 2 + 2);
            }
        }
    } else {
        unpack(shared, a_chunks, kRows, form.a_mn_major, a, kK, 1);
    }
    for (int row = 0; row < kRows; row += 4) {
        int column = 0;
        for (; column + 16 <= n; column += 16)
            multiply_block<2>(a + row * kK, b + column, n, form.accumulate, tile + row * n + column);
        if (column < n)
            multiply_block<1>(a + row * kK, b + column, n, form.accumulate, tile + row * n + column);
    }
}

}  // namespace magihuman::sim
