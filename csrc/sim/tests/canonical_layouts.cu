// Prints canonical_layouts.txt, from CUTLASS alone: what the simulator's tensor core is held against
// (layout_check.cpp reads it). Compiling CuTe takes minutes, hence the committed output. To make it again:
//   nvcc -std=c++20 -arch=sm_90a -I <cutlass>/include canonical_layouts.cu && ./a.out | grep -v ERROR
// Lines, where <hash> is FNV-1a over the numbers named:
//   operand <mn major> <rows> <start byte> <descriptor, start field zero> <hash>: byte offset of
//           each element of one instruction's operand, rows slow, K fast;
//   accumulator <n> <hash>: row + 64 * column for each thread and register;
//   registers <hash>: row + 64 * k for each thread and element of A.
#include <cstdint>
#include <cstdio>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

struct Hash {
    uint64_t value = 14695981039346656037ull;
    void add(int number) { value = (value ^ static_cast<uint32_t>(number)) * 1099511628211ull; }
};

template <SM90::GMMA::Major kMajor, int kRows, class Atom>
void print_operand(Atom atom) {
    constexpr int kStep = 16, kK = 64;
    constexpr uintptr_t kBase = 1 << 20;
    const auto layout = tile_to_shape(atom, Shape<Int<kRows>, Int<kK>>{});
    const auto offset = as_position_independent_swizzle_layout(layout);
    const auto tensor = make_tensor(make_smem_ptr(reinterpret_cast<bfloat16_t*>(kBase)), layout);
    for (int step = 0; step < kK / kStep; ++step) {
        const auto slice = local_tile(tensor, Shape<Int<kRows>, Int<kStep>>{}, make_coord(0, step));
        // On the host CUTLASS takes the shared address to be zero, with a line to say so that the reader
        // skips.
        const auto descriptor = SM90::GMMA::make_gmma_desc<kMajor>(slice);
        const auto start = reinterpret_cast<uintptr_t>(raw_pointer_cast(slice.data())) - kBase;
        Hash hash;
        for (int row = 0; row < kRows; ++row) {
            for (int k = 0; k < kStep; ++k) hash.add(int(offset(row, step * kStep + k) * sizeof(bfloat16_t)));
        }
        std::printf("operand %d %d %d %llu %llu\n", int(kMajor), kRows, int(start),
                    static_cast<unsigned long long>(descriptor.desc_),
                    static_cast<unsigned long long>(hash.value));
    }
}

template <SM90::GMMA::Major kMajor, int kRows>
void print_swizzles() {
    print_operand<kMajor, kRows>(SM90::GMMA::Layout_INTER_Atom<bfloat16_t, kMajor>{});
    print_operand<kMajor, kRows>(SM90::GMMA::Layout_SW32_Atom<bfloat16_t, kMajor>{});
    print_operand<kMajor, kRows>(SM90::GMMA::Layout_SW64_Atom<bfloat16_t, kMajor>{});
    print_operand<kMajor, kRows>(SM90::GMMA::Layout_SW128_Atom<bfloat16_t, kMajor>{});
}

template <class Layout>
void print_registers(const char* kind, Layout layout) {
    Hash hash;
    for (int thread = 0; thread < 128; ++thread) {
        for (int value = 0; value < size<1>(layout); ++value) hash.add(int(layout(thread, value)));
    }
    std::printf("%s %llu\n", kind, static_cast<unsigned long long>(hash.value));
}

int main() {
    using enum SM90::GMMA::Major;
    print_swizzles<K, 64>();
    print_swizzles<K, 128>();
    print_swizzles<MN, 64>();
    print_swizzles<MN, 192>();
    print_registers("accumulator 8", SM90::GMMA::CLayout_64xN<8>{});
    print_registers("accumulator 192", SM90::GMMA::CLayout_64xN<192>{});
    print_registers("registers", SM90::GMMA::ALayout_64x16{});
}
