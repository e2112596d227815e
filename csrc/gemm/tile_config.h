// Which tile a matrix product runs with: a pure function of the problem, with a reason for what was not chosen.
//
// The model, in clocks of one multiprocessor: tiles are dealt out in rounds, so
//   cost = rounds * max(tensor-core clocks, load clocks) of one block of K.
// The tensor cores take 4096 operations a clock; loads come from L2 at about 38 bytes a clock when all
// multiprocessors ask at once (5120 bytes a clock over 132). A pair of blocks fetches its shared operand once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace magihuman {

struct GemmTileShape {
    const char* name;
    int block_m, block_n, cluster;
};

// Every tile that is compiled, the first one preferred at equal cost.
constexpr GemmTileShape kGemmTiles[] = {{"128x256, pairs", 128, 256, 2}, {"128x128", 128, 128, 1}};

struct GemmTileVerdict {
    const GemmTileShape* tile;
    bool chosen;
    double clocks;  // predicted, per 128 bytes of K; 0 where the tile cannot run
    std::string reason;
};

struct GemmProblemShape {
    int64_t m, n, k, groups;
    int num_sms;
};

// One verdict per compiled tile, in their order; exactly one is chosen. `m` is the row capacity: how the rows
// are split among the modalities is known on the device only.
inline std::vector<GemmTileVerdict> choose_gemm_tile(const GemmProblemShape& problem) {
    constexpr double kOperationsPerClock = 4096, kL2BytesPerClock = 38;
    constexpr int64_t kBlockKBytes = 128, kBlockK = 64;
    std::vector<GemmTileVerdict> verdicts;
    size_t best = 0;
    for (const GemmTileShape& tile : kGemmTiles) {
        GemmTileVerdict verdict{&tile, false, 0, ""};
        if (problem.num_sms < tile.cluster) {
            verdict.reason = "needs " + std::to_string(tile.cluster) + " multiprocessors, the grid has " +
                             std::to_string(problem.num_sms);
        } else {
            const int64_t tiles_m = (problem.m + tile.block_m - 1) / tile.block_m;
            const int64_t tiles_n = (problem.n + tile.block_n - 1) / tile.block_n;
            // An odd last row of tiles is paired along N.
            const int64_t works = tiles_m / tile.cluster * tiles_n +
                                  tiles_m % tile.cluster * ((tiles_n + tile.cluster - 1) / tile.cluster);
            const int64_t workers = problem.num_sms / tile.cluster;
            const int64_t rounds = (works + workers - 1) / workers;
            const double math = 2.0 * tile.block_m * tile.block_n * kBlockK / kOperationsPerClock;
            const double loads =
                (tile.block_m + double(tile.block_n) / tile.cluster) * kBlockKBytes / kL2BytesPerClock;
            verdict.clocks = rounds * (math > loads ? math : loads);
            verdict.reason = std::to_string(rounds) + " rounds of " + std::to_string(workers) + " for " +
                             std::to_string(works) + " tiles, " + (math > loads ? "math" : "load") +
                             "-bound: " + std::to_string(static_cast<int64_t>(verdict.clocks)) +
                             " clocks per block of K";
            const double so_far = verdicts.empty() ? 0 : verdicts[best].clocks;
            if (so_far == 0 || verdict.clocks < so_far) best = verdicts.size();
        }
        verdicts.push_back(verdict);
    }
    verdicts[best].chosen = true;
    return verdicts;
}

}  // namespace magihuman
