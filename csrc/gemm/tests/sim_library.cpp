// What only tests need of the matrix products, behind a C interface: kernels with a planted bug, run by the
// simulator, and the choice of tiles.
#include <string>

#include "api.h"
#include "gemm/epilogue_bf16.cuh"
#include "gemm/launch.cuh"
#include "sim/tests/c_interface.h"

namespace magihuman {
namespace {

template <typename Config, gemm::Bug kPlanted>
struct Broken : Config {
    static constexpr gemm::Bug kBug = kPlanted;
};

template <typename Config>
void launch_broken(int bug, const GemmBf16Params& p) {
    const gemm::Bf16Epilogue<gemm::Identity> epilogue{static_cast<bf16*>(p.d), p.ldd, p.g.n};
    const auto run = [&]<gemm::Bug kPlanted>() {
        gemm::launch_tile<Broken<Config, kPlanted>>(p.g, p.g.n, epilogue, "gemm", p.g.num_sms, nullptr);
    };
    switch (static_cast<gemm::Bug>(bug)) {
        case gemm::Bug::kNone:
            return run.template operator()<gemm::Bug::kNone>();
        case gemm::Bug::kNoFullWait:
            return run.template operator()<gemm::Bug::kNoFullWait>();
        case gemm::Bug::kEarlyRelease:
            return run.template operator()<gemm::Bug::kEarlyRelease>();
        case gemm::Bug::kNoPeerRelease:
            return run.template operator()<gemm::Bug::kNoPeerRelease>();
        case gemm::Bug::kStoresBeyondEnd:
            return run.template operator()<gemm::Bug::kStoresBeyondEnd>();
    }
    throw std::invalid_argument("no such bug");
}

}  // namespace

extern "C" {

void sim_register(const void* start, size_t bytes, const char* name) {
    sim::register_global(start, bytes, name);
}
void sim_clear() { sim::clear_globals(); }

int sim_broken_gemm(int bug, int wide, const GemmBf16Params* params, uint64_t seed, char* error) {
    return sim::guarded(error, [&] {
        sim::set_seed(seed);
        wide ? launch_broken<gemm::WideTile>(bug, *params) : launch_broken<gemm::SquareTile>(bug, *params);
    });
}

// The mainloop on 8-bit operands (pitches in elements), without scales.
int sim_e4m3_gemm(const GemmBf16Params* p, uint64_t seed, char* error) {
    return sim::guarded(error, [&] {
        sim::set_seed(seed);
        const gemm::Bf16Epilogue<gemm::Identity> epilogue{static_cast<bf16*>(p->d), p->ldd, p->g.n};
        using Tile = gemm::TileConfig<e4m3, 256, 2, 4>;
        gemm::launch_tile<Tile>(p->g, p->g.n, epilogue, "gemm_e4m3", p->g.num_sms, nullptr);
    });
}

int gemm_shared_bytes(int wide) {
    return static_cast<int>(wide ? gemm::WideTile::kSharedBytes : gemm::SquareTile::kSharedBytes);
}

// One line per compiled tile: "* name: reason" for the chosen one, "- name: reason" for the others.
void gemm_tile_verdicts(int m, int n, int k, int groups, int num_sms, char* text) {
    std::string lines;
    for (const GemmTileVerdict& verdict : choose_gemm_tile({m, n, k, groups, num_sms})) {
        lines +=
            std::string(verdict.chosen ? "* " : "- ") + verdict.tile->name + ": " + verdict.reason + "\n";
    }
    sim::write_text(text, lines);
}

}  // extern "C"

}  // namespace magihuman
