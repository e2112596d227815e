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

}  // namespace

std::vector<uint32_t> operand_chunks(const WgmmaForm& form, bool a, const SharedMemory& memory) {
    const char* operand = a ? "A" : "B";
    const Descriptor d = decode(a ? form.a : form.b, operand);
    const uint32_t rows = a ? 64 : form.n;
    const uint32_t span = swizzle_span(d.swizzle);
    const bool plain = d.swizzle == Swizzle::kNone;
    std::vector<uint32_t> chunks;
    const auto add = [&](uint32_t address) {
        const uint32_t offset = swizzle_offset(address, d.swizzle) - SharedMemory::kWindowStart;
        if (address < SharedMemory::kWindowStart || offset + 16 > memory.size()) {
            fail("out of bounds",
                 text("the descriptor of %s reaches shared address 0x%x; the block has %u bytes from "
                      "0x%x on",
                      operand, address, memory.size(), SharedMemory::kWindowStart));
        }
        chunks.push_back(offset);
    };
    if (a ? form.a_mn_major : form.b_mn_major) {
        chunks.reserve(2 * rows);
        const uint32_t span_chunks = span / 16;
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t c = 0; c < rows / 8; ++c) {
                add(plain ? d.start + c * d.stride + k / 8 * d.leading + k % 8 * 16
                          : d.start + c / span_chunks * d.leading + c % span_chunks * 16 + k / 8 * d.stride +
                                k % 8 * span);
            }
        }
    } else {
        chunks.reserve(2 * rows);
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

constexpr int kK = 16, kPerChunk = 8;

float widen(const uint8_t* element) {
    uint16_t bits;
    std::memcpy(&bits, element, 2);
    return bf16_to_float(bits);
}

// Elements of an operand as float, through store(row, k, value).
template <typename Store>
void unpack(const uint8_t* shared, const std::vector<uint32_t>& chunks, uint32_t rows, bool mn_major,
            Store store) {
    for (size_t i = 0; i < chunks.size(); ++i) {
        const uint8_t* chunk = shared + chunks[i];
        for (int e = 0; e < kPerChunk; ++e) {
            const float value = widen(chunk + e * 2);
            if (mn_major) {
                store(static_cast<int>(i % (rows / 8)) * 8 + e, static_cast<int>(i / (rows / 8)), value);
            } else {
                store(static_cast<int>(i / 2), static_cast<int>(i % 2) * kPerChunk + e, value);
            }
        }
    }
}

}  // namespace

void multiply(const WgmmaForm& form, const uint8_t* shared, const std::vector<uint32_t>& a_chunks,
              const std::vector<uint32_t>& b_chunks, const std::vector<uint32_t>& a_registers, float* tile) {
    const int n = form.n;
    static float a[64][kK], b[kK][256];
    unpack(shared, b_chunks, n, form.b_mn_major, [](int row, int k, float v) { b[k][row] = v; });
    if (form.a_in_registers) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(a_registers.data());
        for (int t = 0; t < 128; ++t) {
            for (int i = 0; i < 8; ++i) {
                const Place place = a_register_place(t, i);
                a[place.row][place.column] = widen(bytes + t * 16 + i * 2);
            }
        }
    } else {
        unpack(shared, a_chunks, 64, form.a_mn_major, [](int row, int k, float v) { a[row][k] = v; });
    }
    // Four rows by one vector of columns at a time; columns of the result are contiguous.
    for (int row = 0; row < 64; row += 4) {
        for (int column = 0; column < n; column += 8) {
            Vector sum[4];
            for (int r = 0; r < 4; ++r) {
                float* at = tile + (row + r) * n + column;
                sum[r] = form.accumulate ? *reinterpret_cast<const Vector*>(at) : Vector{};
            }
            for (int k = 0; k < kK; ++k) {
                const Vector right = *reinterpret_cast<const Vector*>(&b[k][column]);
                for (int r = 0; r < 4; ++r) sum[r] += a[row + r][k] * right;
            }
            for (int r = 0; r < 4; ++r) *reinterpret_cast<Vector*>(tile + (row + r) * n + column) = sum[r];
        }
    }
}

}  // namespace magihuman::sim
