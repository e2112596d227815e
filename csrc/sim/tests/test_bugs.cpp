// A correct pipelined kernel passes every schedule; each planted bug is caught and named.
#include <chrono>
#include <cmath>
#include <set>

#include "sim/tests/harness.h"

namespace magihuman::tests {

using namespace samples;

namespace {

struct Gemm {
    int m = 200, n = 256, k = 64 * 6;
    Buffer<bf16> a{static_cast<size_t>(m) * k, "a"}, b{static_cast<size_t>(n) * k, "b"},
        d{static_cast<size_t>(m) * n, "d", bf16{0xffff}};

    Gemm() {
        fill_normal(a, 1);
        fill_normal(b, 2);
    }

    GemmSampleParams params() {
        constexpr auto kBf16 = ElementType::kBf16;
        constexpr auto kSwizzle = Swizzle::kBytes128;
        const auto map = [&](Buffer<bf16>& buffer, int rows, int columns, int box_rows, const char* name) {
            return make_tensor_map(
                matrix_map_spec(buffer.data(), kBf16, rows, columns, columns * 2, box_rows, 64, kSwizzle),
                name);
        };
        return {map(a, m, k, 128, "a"),
                map(b, n, k, 128, "b"),
                map(d, m, n, 64, "d"),
                (m + 127) / 128,
                n / 128,
                k / 64};
    }

    void run(void (*kernel)(GemmSampleParams), uint64_t seed) {
        sim::set_seed(seed);
        launch(kernel,
               {"gemm_sample", dim3(sim::multiprocessor_count()), GemmSample::kThreads, 1,
                GemmSample::kSharedBytes},
               params());
    }

    double relative_error() {
        double error = 0, norm = 0;
        for (int i = 0; i < m; ++i) {
            for (int j = 0; j < n; ++j) {
                double sum = 0;
                for (int x = 0; x < k; ++x) sum += double(to_float(a[i * k + x])) * to_float(b[j * k + x]);
                const double difference = to_float(d[i * n + j]) - sum;
                error += difference * difference;
                norm += sum * sum;
            }
        }
        return std::sqrt(error / norm);
    }
};

// The bug must be caught under some schedule; under every schedule it is caught as one of `kinds`, and the
// messages together name each of `names`.
void caught(void (*kernel)(GemmSampleParams), const std::set<std::string>& kinds,
            const std::vector<std::string>& names) {
    Gemm gemm;
    int catches = 0;
    std::string messages;
    constexpr int kSeeds = 16;  // each kind of weather with each kind of slowness
    for (int seed = 0; seed < kSeeds; ++seed) {
        try {
            gemm.run(kernel, seed);
        } catch (const sim::Error& error) {
            ++catches;
            messages += error.what();
            expect(kinds.count(error.kind) == 1, std::string("caught as something else: ") + error.what());
        }
    }
    std::printf("  caught in %d of %d schedules\n", catches, kSeeds);
    expect(catches > 0, "never caught");
    expect_contains(messages, "kernel gemm_sample");
    for (const std::string& name : names) expect_contains(messages, name);
}

}  // namespace

SIM_TEST(correct_kernel_passes_every_schedule) {
    Gemm gemm;
    sim::take_counters();
    const auto start = std::chrono::steady_clock::now();
    constexpr int kSeeds = 50;
    for (int seed = 0; seed < kSeeds; ++seed) {
        for (bf16& value : gemm.d) value.bits = 0xffff;
        gemm.run(gemm_sample<Bug::kNone>, seed);
        const double error = seed < 4 ? gemm.relative_error() : 0;
        expect(error < 3e-3, "relative error " + std::to_string(error));
        for (const bf16& value : gemm.d)
            expect(!std::isnan(to_float(value)), "an element is NaN or was never written");
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const sim::Counters counters = sim::take_counters();
    const double tiles = kSeeds * 4;
    std::printf("  %.2f ms a 128x128x384 tile, %.0f switches and %.0f WGMMAs a tile\n",
                1e3 * seconds.count() / tiles, counters.switches / tiles, counters.wgmmas / tiles);
}

SIM_TEST(same_seed_same_schedule) {
    Gemm gemm;
    uint64_t switches[3];
    for (int i = 0; i < 3; ++i) {
        sim::take_counters();
        gemm.run(gemm_sample<Bug::kNone>, i == 2 ? 5 : 4);
        switches[i] = sim::take_counters().switches;
    }
    expect(switches[0] == switches[1], "the same seed gave another schedule");
    expect(switches[0] != switches[2], "another seed gave the same schedule");
}

SIM_TEST(missing_wait) {
    caught(gemm_sample<Bug::kNoFullWait>, {"read before arrival", "un-waited work"},
           {"role consumer", "full_barrier["});
}
SIM_TEST(wrong_phase) {
    caught(gemm_sample<Bug::kWrongPhase>, {"read before arrival", "deadlock"}, {"role consumer"});
}
SIM_TEST(too_few_bytes) {
    caught(gemm_sample<Bug::kTooFewBytes>, {"transaction-count mismatch", "read before arrival"},
           {"full_barrier["});
}
SIM_TEST(too_many_bytes) {
    caught(gemm_sample<Bug::kTooManyBytes>, {"transaction-count mismatch"},
           {"full_barrier[0]", "role consumer", "128 bytes"});
}
SIM_TEST(early_release) {
    caught(gemm_sample<Bug::kEarlyRelease>,
           {"early overwrite", "read before arrival", "phase overrun", "deadlock"},
           {"role producer", "WGMMA by role consumer"});
}
SIM_TEST(deadlock) {
    caught(gemm_sample<Bug::kNoRelease>, {"deadlock"},
           {"role producer waits at mbarrier empty_barrier[0] for parity 0",
            "role consumer waits at mbarrier full_barrier[0]"});
}
SIM_TEST(missing_wgmma_fence) {
    caught(gemm_sample<Bug::kNoWgmmaFence>, {"missing wgmma fence"}, {"role consumer"});
}
SIM_TEST(touched_accumulator) {
    caught(gemm_sample<Bug::kTouchedAccumulator>, {"register use in flight"}, {"accumulator 7"});
}
SIM_TEST(missing_final_wait) {
    caught(gemm_sample<Bug::kNoFinalWait>, {"un-waited work", "early overwrite", "read before arrival"},
           {"role consumer"});
}
SIM_TEST(missing_proxy_fence) {
    caught(gemm_sample<Bug::kNoProxyFence>, {"missing proxy fence"},
           {"TMA store by role consumer", "fence_proxy_async"});
}
SIM_TEST(missing_store_wait) {
    caught(gemm_sample<Bug::kNoStoreWait>, {"early overwrite"}, {"TMA store by role consumer"});
}
SIM_TEST(exit_during_store) {
    caught(gemm_sample<Bug::kExitDuringStore>, {"un-waited work"}, {"TMA stores"});
}
SIM_TEST(misaligned_descriptor) {
    caught(gemm_sample<Bug::kMisalignedDescriptor>, {"misaligned"}, {"descriptor of A"});
}
SIM_TEST(missing_init_fence) {
    caught(gemm_sample<Bug::kNoInitFence>, {"mbarrier not initialised"}, {"full_barrier[0]"});
}
SIM_TEST(missing_init_sync) {
    caught(gemm_sample<Bug::kNoInitSync>, {"mbarrier not initialised"}, {"before mbarrier_init"});
}
SIM_TEST(wrong_barrier_count) {
    caught(gemm_sample<Bug::kWrongBarrierCount>, {"arrival-count mismatch", "deadlock"}, {"named barrier"});
}
SIM_TEST(tile_out_of_bounds) {
    caught(gemm_sample<Bug::kOutOfBounds>, {"out of bounds"}, {"TMA load", "role producer"});
}
SIM_TEST(divergent_wgmma) {
    caught(gemm_sample<Bug::kDivergentWgmma>, {"divergent warpgroup"}, {"role consumer"});
}

SIM_TEST(launches_are_checked) {
    Gemm gemm;
    const auto attempt = [&](LaunchConfig config) {
        return std::string(error_of([&] { launch(gemm_sample<Bug::kNone>, config, gemm.params()); }).what());
    };
    expect_contains(attempt({"k", dim3(3), 384, 2, 1024}), "cluster must divide");
    expect_contains(attempt({"k", dim3(1), 100, 1, 1024}), "multiple of 32");
    expect_contains(attempt({"k", dim3(1), 384, 1, 256 * 1024}), "227 KB");
}

}  // namespace magihuman::tests
