// The copy engine: boxes of every rank, zero fill, swizzles, multicast, and what it refuses.
#include "sim/tests/harness.h"

namespace magihuman::tests {

using namespace samples;

namespace {

// Loads the box at `source` of a [.., 7, 6, 5, 4, 24] tensor and stores it at `target` of another of that
// shape.
template <int kRank>
void check_copy(const int (&source)[5], const int (&target)[5], Swizzle swizzle) {
    constexpr uint64_t kDims[5] = {24, 4, 5, 6, 7};
    const uint32_t box[5] = {swizzle == Swizzle::kNone ? 24u : swizzle_span(swizzle) / 4, 3, 2, 2, 3};
    TensorMapSpec spec{nullptr, ElementType::kFloat32, kRank, {}, {}, {}, swizzle};
    size_t count = 1, box_count = 1;
    for (int i = 0; i < kRank; ++i) {
        spec.dims[i] = kDims[i];
        spec.box[i] = box[i];
        count *= kDims[i];
        box_count *= box[i];
        if (i + 1 < kRank) spec.strides[i] = count * 4;
    }
    Buffer<float> from(count, "from"), to(count, "to"), expected(count, "expected");
    for (size_t i = 0; i < count; ++i) from[i] = static_cast<float>(i + 1);
    for (size_t i = 0; i < count; ++i) to[i] = expected[i] = -1;
    for (size_t i = 0; i < box_count; ++i) {
        size_t rest = i, read = 0, write = 0, pitch = 1;
        bool readable = true, writable = true;
        for (int d = 0; d < kRank; ++d) {
            const int r = source[d] + static_cast<int>(rest % box[d]),
                      w = target[d] + static_cast<int>(rest % box[d]);
            rest /= box[d];
            readable &= r >= 0 && r < static_cast<int>(kDims[d]);
            writable &= w >= 0 && w < static_cast<int>(kDims[d]);
            read += r * pitch;
            write += w * pitch;
            pitch *= kDims[d];
        }
        if (writable) expected[write] = readable ? from[read] : 0;
    }
    spec.base = from.data();
    CopySampleParams params{make_tensor_map(spec, "from"), {}, spec.box_bytes(), {}, {}};
    spec.base = to.data();
    params.to = make_tensor_map(spec, "to");
    std::copy_n(source, 5, params.source);
    std::copy_n(target, 5, params.target);
    for (int seed = 0; seed < 4; ++seed) {
        sim::set_seed(seed);
        launch(copy_sample<kRank>, {"copy_sample", dim3(1), 32, 1, params.bytes + 8}, params);
        for (size_t i = 0; i < count; ++i) {
            if (to[i] != expected[i])
                throw std::runtime_error("rank " + std::to_string(kRank) + ", element " + std::to_string(i));
        }
    }
}

TensorMapSpec small_map(const void* base) {
    return matrix_map_spec(base, ElementType::kBf16, 16, 64, 128, 16, 64, Swizzle::kBytes128);
}

}  // namespace

SIM_TEST(tma_every_rank_with_zero_fill) {
    constexpr int kInside[5] = {4, 1, 2, 3, 1}, kBefore[5] = {-5, -1, -1, -1, -2},
                  kBeyond[5] = {20, 2, 4, 5, 5}, kFar[5] = {100, 0, 0, 0, 0};
    for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::kBytes32, Swizzle::kBytes64}) {
        check_copy<2>(kInside, kInside, swizzle);
        check_copy<2>(kBefore, kInside, swizzle);
        check_copy<3>(kBefore, kBeyond, swizzle);
        check_copy<4>(kBeyond, kBefore, swizzle);
        check_copy<5>(kInside, kBeyond, swizzle);
        check_copy<5>(kBeyond, kInside, swizzle);
        check_copy<3>(kFar, kInside, swizzle);
    }
}

// Where the chunks of a swizzled tile lie, written by row instead of by address bits: 128-byte rows, chunk
// XOR row % 8; 64-byte rows, chunk XOR (row / 2) % 4; 32-byte rows, chunk XOR (row / 4) % 2. The tensor
// core's side of the same patterns is held against CUTLASS (layout_check.cpp); that the copy engine's agree
// is what CUTLASS assumes.
SIM_TEST(tma_swizzle_patterns) {
    struct Pattern {
        Swizzle swizzle;
        int rows_per_line, modulus;
    };
    for (const auto& [swizzle, rows_per_line, modulus] :
         {Pattern{Swizzle::kBytes128, 1, 8}, Pattern{Swizzle::kBytes64, 2, 4},
          Pattern{Swizzle::kBytes32, 4, 2}}) {
        const int chunks = static_cast<int>(swizzle_span(swizzle)) / 16;
        Buffer<bf16> from(32 * 64, "from");
        for (size_t i = 0; i < from.size(); ++i) from[i].bits = static_cast<uint16_t>(i);
        static uint8_t image[32 * 128];
        struct Params {
            TensorMap map;
            uint32_t bytes;
        };
        const auto kernel = +[](Params p) {
            uint8_t* shared = dynamic_shared_memory();
            auto* barrier = reinterpret_cast<Barrier*>(shared + p.bytes);
            if (threadIdx.x != 0) return;
            mbarrier_init(barrier, 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect_tx(barrier, p.bytes);
            tma_load(shared, &p.map, barrier, CacheHint::kNormal, 0, 0);
            mbarrier_wait(barrier, 0);
            for (uint32_t i = 0; i < p.bytes; i += 2) {
                const auto value = load_shared<uint16_t>(shared + i);
                std::memcpy(image + i, &value, 2);
            }
        };
        const Params params{make_tensor_map(matrix_map_spec(from.data(), ElementType::kBf16, 32, 64, 128, 32,
                                                            chunks * 8, swizzle),
                                            "from"),
                            32u * chunks * 16};
        launch(kernel, {"image", dim3(1), 32, 1, params.bytes + 8}, params);
        for (int row = 0; row < 32; ++row) {
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const int where = row * chunks + (chunk ^ (row / rows_per_line % modulus));
                uint16_t first;
                std::memcpy(&first, image + where * 16, 2);
                expect(first == row * 64 + chunk * 8,
                       "row " + std::to_string(row) + ", chunk " + std::to_string(chunk));
            }
        }
    }
}

SIM_TEST(multicast_in_clusters) {
    for (const uint32_t blocks : {1u, 2u, 4u}) {
        constexpr int kRounds = 5;
        const uint32_t rows = kRounds * 16 * blocks;
        Buffer<bf16> from(rows * 64, "from");
        for (size_t i = 0; i < from.size(); ++i) from[i].bits = static_cast<uint16_t>(i);
        Buffer<uint16_t> to(blocks * rows * 64, "to");
        const MulticastSampleParams params{
            make_tensor_map(
                matrix_map_spec(from.data(), ElementType::kBf16, rows, 64, 128, 16, 64, Swizzle::kBytes128),
                "from"),
            to.data(), kRounds};
        const LaunchConfig config{"multicast_sample", dim3(blocks), 64, blocks, blocks * 16 * 128 + 16};
        for (int seed = 0; seed < 12; ++seed) {
            for (uint16_t& value : to) value = 0xffff;
            sim::set_seed(seed);
            launch(multicast_sample<ClusterBug::kNone>, config, params);
            for (uint32_t i = 0; i < to.size(); ++i) {
                const uint32_t row = i / 64 % rows, chunk = (i / 8 % 8) ^ (row % 8);
                expect(to[i] == static_cast<uint16_t>(row * 64 + chunk * 8 + i % 8),
                       "element " + std::to_string(i));
            }
        }
        if (blocks == 1) continue;
        const auto caught = [&](void (*kernel)(MulticastSampleParams), const char* kind) {
            int count = 0;
            for (int seed = 0; seed < 12; ++seed) {
                sim::set_seed(seed);
                try {
                    launch(kernel, config, params);
                } catch (const sim::Error& error) {
                    expect(kind == nullptr || error.kind == kind, error.what());
                    ++count;
                }
            }
            return count;
        };
        const int overwritten = caught(multicast_sample<ClusterBug::kNoRelease>, nullptr);
        expect(overwritten > 6, "overwriting a peer's memory was caught in only " +
                                    std::to_string(overwritten) + " of 12 schedules");
        const int ended = caught(multicast_sample<ClusterBug::kNoDrain>, "block ended");
        expect(ended > 6, "an early end was caught in only " + std::to_string(ended) + " of 12 schedules");
        expect(caught(multicast_sample<ClusterBug::kNoInitFence>, "mbarrier not initialised") == 12,
               "a missing fence was not always caught");
    }
}

SIM_TEST(relaxed_arrivals_publish_nothing) {
    const LaunchConfig config{"cluster_start_sample", dim3(2), 64, 2, 8};
    const auto run = [&](void (*kernel)()) {
        for (int seed = 0; seed < 4; ++seed) {
            sim::set_seed(seed);
            launch(kernel, config);
        }
    };
    run(cluster_start_sample<ClusterBug::kNone, true>);
    run(cluster_start_sample<ClusterBug::kNone, false>);
    run(cluster_start_sample<ClusterBug::kNoInitFence, false>);  // block_sync does publish
    const sim::Error error = error_of([&] { run(cluster_start_sample<ClusterBug::kNoInitFence, true>); });
    expect(error.kind == "mbarrier not initialised", error.what());
    expect_contains(error.what(), "all_barrier is used by another thread");
}

SIM_TEST(tensor_maps_are_checked) {
    Buffer<bf16> memory(16 * 64, "memory");
    const auto refusal = [&](auto change) {
        TensorMapSpec spec = small_map(memory.data());
        change(spec);
        try {
            make_tensor_map(spec, "x_map");
        } catch (const std::exception& error) {
            return std::string(error.what());
        }
        throw std::runtime_error("accepted");
    };
    expect_contains(refusal([&](auto& s) { s.base = memory.data() + 1; }), "x_map: misaligned base");
    expect_contains(refusal([](auto& s) { s.strides[0] = 136; }), "misaligned stride");
    expect_contains(refusal([](auto& s) { s.box[1] = 257; }), "box of dimension 1 must be 1..256, got 257");
    expect_contains(refusal([](auto& s) { s.box[0] = 128; }),
                    "must fill the swizzle span of 128 bytes, got 256");
    expect_contains(refusal([](auto& s) { s.box[0] = 4, s.swizzle = Swizzle::kNone; }),
                    "multiple of 16 bytes, got 8");
    expect_contains(refusal([](auto& s) { s.rank = 6; }), "rank must be 1..5");
    expect_contains(refusal([](auto& s) { s.dims[1] = 0; }), "size of dimension 1");
    expect_contains(refusal([](auto& s) { s.dims[1] = 17; }),
                    "out of bounds: x_map: 2176 bytes at offset 0 of global buffer memory, which has 2048");
}

SIM_TEST(accesses_are_checked) {
    Buffer<float> memory(64, "memory");
    static float* global;
    global = memory.data();
    static Buffer<bf16>* source;
    Buffer<bf16> tile(16 * 64, "tile");
    source = &tile;
    const auto caught = [](void (*kernel)(), const char* kind, const char* part) {
        const sim::Error error = error_of([&] { launch(kernel, {"accesses", dim3(1), 32, 1, 8192}); });
        expect(error.kind == kind, std::string(error.what()) + " is not of kind " + kind);
        expect_contains(error.what(), part);
    };
    caught(+[] { store_global(global + 64, 1.0f); }, "out of bounds", "offset 256 of global buffer memory");
    caught(+[] { load_global(reinterpret_cast<float2*>(global + 1)); }, "misaligned", "8 bytes");
    caught(+[] { store_shared(dynamic_shared_memory() + 8190, 1.0f); }, "out of bounds", "offset 8190");
    caught(
        +[] { load_shared<float>(dynamic_shared_memory()); }, "read before arrival", "nothing has written");
    caught(+[] { store_shared(dynamic_shared_memory() + 4, uint4{}); }, "misaligned", "16 bytes");
    caught(
        +[] { mbarrier_wait(reinterpret_cast<Barrier*>(dynamic_shared_memory()), 0); },
        "mbarrier not initialised", "shared offset 0");
    caught(+[] { named_barrier_sync(3, 48); }, "arrival-count mismatch", "named barrier 3");
    caught(
        +[] {
            if (threadIdx.x > 0) warp_sync();
        },
        "divergent warp", "lane 0");
    caught(
        +[] {
            auto* barrier = reinterpret_cast<Barrier*>(dynamic_shared_memory());
            if (threadIdx.x != 0) return;
            mbarrier_init(barrier, 1, "twice");
            mbarrier_arrive(barrier);
            std::memset(static_cast<void*>(barrier), 0, 8);
            mbarrier_arrive(barrier);
        },
        "out of bounds", "twice was overwritten by data");
    caught(
        +[] {
            uint8_t* shared = dynamic_shared_memory();
            if (threadIdx.x != 0) return;
            alignas(128) const TensorMap map = make_tensor_map(small_map(source->data()), "tile");
            std::memset(shared, 0, 2048);  // a plain write, which no proxy rule can be checked for
            tma_store(&map, shared, 0, 0);
        },
        "untracked write", "plain pointer");
    caught(
        +[] {
            uint8_t* shared = dynamic_shared_memory();
            auto* barrier = reinterpret_cast<Barrier*>(shared + 4096);
            if (threadIdx.x != 0) return;
            alignas(128) const TensorMap map = make_tensor_map(small_map(source->data()), "tile");
            mbarrier_init(barrier, 1, "loaded");
            fence_mbarrier_init();
            mbarrier_arrive_expect_tx(barrier, 2048);
            tma_load(shared, &map, barrier, CacheHint::kNormal, 0, 0);
        },
        "un-waited work", "nobody waited");
    caught(
        +[] {
            alignas(128) const TensorMap map = make_tensor_map(small_map(source->data()), "tile");
            tma_store(&map, dynamic_shared_memory() + 512, 0, 0);
        },
        "misaligned", "must be a multiple of 1024");
}

}  // namespace magihuman::tests
