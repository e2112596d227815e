// Which tile attention runs with: a pure function of the problem, with a reason for what was not chosen.
//
// What a tile of block_m queries and block_n keys must fit into: a thread of a consumer warpgroup (64 queries) holds
// block_n / 2 scores, block_n / 4 registers of weights, 64 outputs and about 32 of everything else; a block holds its
// queries and a ring of key and value tiles in 227 KB.
//
// The model, in clocks of one multiprocessor: tiles are dealt out in rounds, so
//   cost = rounds * key tiles * (max(tensor cores, L2, exponentials) + 128).
// Tensor cores take 4096 operations a clock, L2 gives about 38 bytes a clock when all multiprocessors ask at once, the
// special-function units 16 exponentials. 128: barriers, row maxima and rescaling, which nothing hides entirely.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace magihuman {

struct AttentionTileShape {
    const char* name;
    int block_m, block_n, slots, cluster;  // slots: key or value tiles in the ring
};

// Every tile that was considered; the first three are compiled, the first one preferred at equal cost.
constexpr AttentionTileShape kAttentionTiles[] = {{"128x176, pairs", 128, 176, 4, 2},
                                                  {"128x176", 128, 176, 4, 1},
                                                  {"128x128", 128, 128, 6, 1},
                                                  {"128x192", 128, 192, 4, 1},
                                                  {"192x128", 192, 128, 4, 1}};
constexpr int kCompiledAttentionTiles = 3;

struct AttentionTileVerdict {
    const AttentionTileShape* tile;
    bool chosen;
    double clocks;  // predicted; 0 where the tile cannot run
    std::string reason;
};

// `keys`: what a query sees at most.
struct AttentionProblemShape {
    int64_t queries, heads, keys;
    int num_sms;
};

// One verdict per tile, in their order; exactly one is chosen.
inline std::vector<AttentionTileVerdict> choose_attention_tile(const AttentionProblemShape& problem) {
    constexpr int kHead = 128, kRegisters = 512, kProducerRegisters = 40, kOther = 32;
    constexpr int kSharedBytes = 227 * 1024, kBarrierBytes = 1024, kRowBytes = 2 * kHead;
    constexpr double kOperationsPerClock = 4096, kL2BytesPerClock = 38, kExponentialsPerClock = 16,
                     kOverhead = 128;
    std::vector<AttentionTileVerdict> verdicts;
    int best = -1;
    for (const AttentionTileShape& tile : kAttentionTiles) {
        AttentionTileVerdict verdict{&tile, false, 0, ""};
        const int n = tile.block_n, consumers = tile.block_m / 64;
        const int registers = n / 2 + n / 4 + kHead / 2 + kOther;
        const int available = (kRegisters - kProducerRegisters) / consumers / 8 * 8;
        const int shared = (tile.block_m + tile.slots * n) * kRowBytes + kBarrierBytes;
        if (registers > available) {
            verdict.reason = "needs " + std::to_string(registers) + " registers a thread, " +
                             std::to_string(available) + " are there";
        } else if (shared > kSharedBytes) {
            verdict.reason = "needs " + std::to_string(shared) + " bytes of shared memory, " +
                             std::to_string(kSharedBytes) + " are there";
        } else if (problem.num_sms < tile.cluster) {
            verdict.reason = "needs " + std::to_string(tile.cluster) + " multiprocessors, the grid has " +
                             std::to_string(problem.num_sms);
        } else {
            const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
            // Any two query tiles of one kv head make a pair.
            const int64_t tiles = ceil_div(problem.queries, tile.block_m) * problem.heads;
            const int64_t units = ceil_div(tiles, tile.cluster), workers = problem.num_sms / tile.cluster;
            const int64_t rounds = ceil_div(units, workers), key_tiles = ceil_div(problem.keys, n);
            const double math = 4.0 * tile.block_m * n * kHead / kOperationsPerClock;
            const double loads = 2.0 * n * kRowBytes / tile.cluster / kL2BytesPerClock;
            const double exponentials = double(tile.block_m) * n / kExponentialsPerClock;
            verdict.clocks = rounds * key_tiles * (std::max({math, loads, exponentials}) + kOverhead);
            verdict.reason = std::to_string(rounds) + " rounds of " + std::to_string(workers) + " for " +
                             std::to_string(units) + " units of " + std::to_string(key_tiles) +
                             " key tiles: " + std::to_string(static_cast<int64_t>(verdict.clocks)) +
                             " clocks";
            if (best < 0 || verdict.clocks < verdicts[best].clocks) best = static_cast<int>(verdicts.size());
        }
        verdicts.push_back(verdict);
    }
    verdicts[best].chosen = true;
    return verdicts;
}

}  // namespace magihuman
