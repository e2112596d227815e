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
        case gemm::Bug::kNoDrain:
            return run.template operator()<gemm::Bug::kNoDrain>();
        case gemm::Bug::kStoresBeyondEnd:
            return run.template operator()<gemm::Bug::kStoresBeyondEnd>();
    }
    throw std::invalid_argument("no such bug");
}

struct ScheduledTile {
    int round, cluster, rank, group, row, column, rows, a_rows, narrow, shares_rows;
};

template <int kCluster>
int write_schedule(const gemm::TileList& list, const ModalityRanges& ranges, int clusters,
                   ScheduledTile* out) {
    int count = 0;
    for (int cluster = 0; cluster < clusters; ++cluster) {
        for (int rank = 0; rank < kCluster; ++rank) {
            gemm::Scheduler<kCluster> scheduler(list, ranges, rank, cluster, clusters);
            gemm::Tile tile;
            for (int round = 0; scheduler.next(tile); ++round) {
                out[count++] = {
                    round,       cluster,   rank,        tile.group,  tile.row,
                    tile.column, tile.rows, tile.a_rows, tile.narrow, tile.shared == gemm::Shared::kRows};
            }
        }
    }
    return count;
}

}  // namespace

extern "C" {

// Every tile of every block, into room for all of them; returns how many there are. `offsets` as on the device.
int gemm_schedule(const int* offsets, int groups, int n_tiles, int narrow, int block_n, int blocks_of_cluster,
                  int clusters, ScheduledTile* out) {
    const gemm::TileList list{offsets, offsets[3], groups, n_tiles, narrow, block_n};
    const ModalityRanges ranges{offsets[1], offsets[2], offsets[3]};
    return blocks_of_cluster == 2 ? write_schedule<2>(list, ranges, clusters, out)
                                  : write_schedule<1>(list, ranges, clusters, out);
}

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
