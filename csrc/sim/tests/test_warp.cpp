// Warp operations and number formats.
#include <cmath>

#include "sim/tests/harness.h"

namespace magihuman::tests {

using namespace samples;

SIM_TEST(matrix_moves_and_shuffles) {
    Buffer<uint16_t> in(256, "in"), out(768, "out");
    Buffer<float> sums(32, "sums");
    Buffer<uint32_t> votes(1, "votes");
    for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(1000 + i);
    for (int seed = 0; seed < 8; ++seed) {
        votes[0] = 0;
        sim::set_seed(seed);
        launch(warp_sample<32>, {"warp_sample", dim3(1), 32, 1, 2048}, in.data(), out.data(), sums.data(),
               votes.data());
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                expect(out[i * 16 + j] == in[i * 16 + j], "ldmatrix, stmatrix");
                expect(out[256 + i * 16 + j] == in[j * 16 + i], "ldmatrix transposed, stmatrix");
                expect(out[512 + i * 16 + j] == in[i * 16 + j], "ldmatrix transposed, stmatrix transposed");
            }
        }
        for (int i = 0; i < 32; ++i) expect(sums[i] == 31 * 32 * 63 / 6 + 5, "sum by shuffles");
        expect(votes[0] == 0xaaaaaaaa, "ballot");
    }
}

// Every pattern survives the way through float, and values in the middle between neighbours go to the even one.
SIM_TEST(number_formats) {
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        if (!std::isnan(to_float(bf16{half}))) expect(to_bf16(to_float(bf16{half})).bits == half, "bf16");
        if (!std::isnan(to_float(fp16{half}))) expect(to_fp16(to_float(fp16{half})).bits == half, "fp16");
    }
    expect(to_bf16(1 + 0x1p-8f).bits == 0x3f80 && to_bf16(1 + 0x3p-8f).bits == 0x3f82, "bf16 ties to even");
    expect(to_fp16(65519).bits == 0x7bff && to_fp16(65520).bits == 0x7c00 && to_fp16(0x1p-25f).bits == 0,
           "fp16 edges");
    expect(pack_bf16x2(1, -2) == 0xc0003f80 && low_bf16(0xc0003f80) == 1 && high_bf16(0xc0003f80) == -2,
           "packing order");
    expect(sigmoid(0) == 0.5f && sigmoid(-1e4f) == 0 && sigmoid(1e4f) == 1, "sigmoid");
}

}  // namespace magihuman::tests
