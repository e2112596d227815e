// WGMMA against float64: every operand form, swizzle and direction, from tiles that the copy engine wrote.
#include <cmath>

#include "sim/tests/harness.h"

namespace magihuman::tests {

using namespace samples;

namespace {

// Small integers and halves: products and sums are exact in float32, so a wrong element cannot hide in
// rounding.
bf16 element(uint32_t bits) { return to_bf16(static_cast<float>(static_cast<int>(bits % 17) - 8) / 2); }

template <int kN, Major kA, Major kB, Swizzle kSwizzle, bool kARegisters = false>
void check() {
    constexpr int kK = 64;
    constexpr uint32_t kSpanElements = swizzle_span(kSwizzle) / sizeof(bf16);
    Buffer<bf16> a(64 * kK, "a"), b(kN * kK, "b");
    Buffer<float> d(64 * kN, "d", NAN);
    std::mt19937 generator(kN);
    for (bf16& value : a) value = element(generator());
    for (bf16& value : b) value = element(generator());
    const auto map = [](Buffer<bf16>& buffer, Major major, int rows) {
        const int lines = major == Major::kK ? rows : kK, length = major == Major::kK ? kK : rows;
        return make_tensor_map(matrix_map_spec(buffer.data(), ElementType::kBf16, lines, length,
                                               length * sizeof(bf16), lines, kSpanElements, kSwizzle),
                               "operand");
    };
    const WgmmaSampleParams params{map(a, kA, 64), map(b, kB, kN), reinterpret_cast<const uint8_t*>(a.data()),
                                   d.data()};
    const auto at = [](Buffer<bf16>& buffer, Major major, int rows, int row, int k) {
        return double(to_float(buffer[major == Major::kK ? row * kK + k : k * rows + row]));
    };
    for (int seed = 0; seed < 4; ++seed) {
        for (float& value : d) value = NAN;
        sim::set_seed(seed);
        launch(wgmma_sample<kN, kA, kB, kSwizzle, kARegisters>,
               {"wgmma_sample", dim3(1), 128, 1, 64 * 128 + kN * 128 + 8}, params);
        for (int i = 0; i < 64; ++i) {
            for (int j = 0; j < kN; ++j) {
                double sum = 0;
                for (int k = 0; k < kK; ++k) sum += at(a, kA, 64, i, k) * at(b, kB, kN, j, k);
                if (d[i * kN + j] != sum) {
                    throw std::runtime_error("D[" + std::to_string(i) + ", " + std::to_string(j) + "] is " +
                                             std::to_string(d[i * kN + j]) + ", expected " +
                                             std::to_string(sum));
                }
            }
        }
    }
}

template <Swizzle kSwizzle>
void check_bf16() {
    check<64, Major::kK, Major::kK, kSwizzle>();
    check<64, Major::kK, Major::kMN, kSwizzle>();
    check<128, Major::kMN, Major::kK, kSwizzle>();
    check<192, Major::kMN, Major::kMN, kSwizzle>();
    check<64, Major::kK, Major::kK, kSwizzle, true>();
    check<128, Major::kK, Major::kMN, kSwizzle, true>();
}

}  // namespace

SIM_TEST(wgmma_bf16_swizzle_128) { check_bf16<Swizzle::kBytes128>(); }
SIM_TEST(wgmma_bf16_swizzle_64) { check_bf16<Swizzle::kBytes64>(); }
SIM_TEST(wgmma_bf16_swizzle_32) { check_bf16<Swizzle::kBytes32>(); }
SIM_TEST(wgmma_bf16_no_swizzle) { check_bf16<Swizzle::kNone>(); }

SIM_TEST(wgmma_bf16_every_width) {
    [&]<int... kI>(std::integer_sequence<int, kI...>) {
        (check<8 * (kI + 1), Major::kK, Major::kK, Swizzle::kBytes128>(), ...);
    }(std::make_integer_sequence<int, 32>{});
}

SIM_TEST(touched_a_register) {
    Buffer<bf16> a(64 * 64, "a"), b(64 * 64, "b");
    Buffer<float> d(64 * 64, "d");
    fill_normal(a, 1);
    fill_normal(b, 2);
    const TensorMap map = make_tensor_map(
        matrix_map_spec(b.data(), ElementType::kBf16, 64, 64, 128, 64, 64, Swizzle::kBytes128), "operand");
    const WgmmaSampleParams params{map, map, reinterpret_cast<const uint8_t*>(a.data()), d.data()};
    for (int seed = 0; seed < 4; ++seed) {
        sim::set_seed(seed);
        const sim::Error error = error_of([&] {
            launch(wgmma_sample<64, Major::kK, Major::kK, Swizzle::kBytes128, true, true>,
                   {"wgmma_sample", dim3(1), 128, 1, 2 * 64 * 128 + 8}, params);
        });
        expect(error.kind == "register use in flight", error.what());
        expect_contains(error.what(), "thread 77: A registers were changed");
    }
}

// Bits written out by hand from the fields of CUTLASS's GmmaDescriptor, not through the code under test.
SIM_TEST(descriptor_bits) {
    struct Outcome {
        uint64_t k128, k32, mn64, none, advanced;
    };
    static Outcome seen;
    const auto kernel = +[]() {
        uint8_t* tile = dynamic_shared_memory() + 3072;  // shared address 1024 + 3072 = 0x1000
        seen = {k_major_descriptor<Swizzle::kBytes128>(tile), k_major_descriptor<Swizzle::kBytes32>(tile),
                mn_major_descriptor<Swizzle::kBytes64>(tile, 0x2000),
                matrix_descriptor(tile, 0x800, 0x80, Swizzle::kNone),
                advance(k_major_descriptor<Swizzle::kBytes128>(tile), 32)};
    };
    launch(kernel, {"descriptors", dim3(1), 32, 1, 8192});
    expect(seen.k128 == (0x100ull | 1ull << 16 | 64ull << 32 | 1ull << 62), "K-major, 128-byte swizzle");
    expect(seen.k32 == (0x100ull | 1ull << 16 | 16ull << 32 | 3ull << 62), "K-major, 32-byte swizzle");
    expect(seen.mn64 == (0x100ull | 0x200ull << 16 | 32ull << 32 | 2ull << 62), "MN-major, 64-byte swizzle");
    expect(seen.none == (0x100ull | 0x80ull << 16 | 8ull << 32), "no swizzle");
    expect(seen.advanced == seen.k128 + 2, "advance by 32 bytes");
}

}  // namespace magihuman::tests
