// Which tile a convolution runs with: a pure function of the problem, with a reason for what was not chosen.
//
// The model, in clocks of one multiprocessor: tiles are dealt out in rounds, so
//   cost = rounds * max(tensor cores, loads from L2, shared memory) for one box of pixels (64 channels, one time
//   tap, one horizontal tap and all vertical ones).
// The tensor cores take 4096 operations a clock. L2 gives about 38 bytes a clock when all multiprocessors ask at
// once; shared memory 128, for what products read and for what arrives. A unit's box is 8 (unit_rows + taps_y - 1)
// pixels of 128 bytes; a pair of blocks fetches its weights once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace magihuman {

struct ConvTileShape {
    const char* name;
    int units, unit_rows, block_n, cluster;  // a unit is 8 pixels by unit_rows
};

// Every tile that is compiled, the first one preferred at equal cost. That one multiplies weights by pixels.
constexpr ConvTileShape kConvTiles[] = {
    {"64 channels x 512 pixels", 2, 32, 64, 1},
    {"128 pixels x 256 channels, pairs", 2, 8, 256, 2},
    {"256 pixels x 128 channels", 4, 8, 128, 1},
};

struct ConvProblemShape {
    int64_t frames, height, width;
    int channels;  // output channels of a phase
    int phases;    // convolutions of the same pixels
    int taps_y;    // vertical taps
    bool norm;     // the epilogue needs all channels of a pixel
    bool tall;     // the tile of 64 channels is compiled for this kernel
    int num_sms;
};

struct ConvTileVerdict {
    const ConvTileShape* tile;
    bool chosen;
    double clocks;  // predicted, per box; 0 where the tile cannot run
    std::string reason;
};

// Units of a tile, parts at the edges counted whole.
inline int64_t conv_units(int64_t frames, int64_t height, int64_t width, int64_t unit_rows) {
    return frames * ((height + unit_rows - 1) / unit_rows) * ((width + 7) / 8);
}

// One verdict per tile of kConvTiles, in their order; exactly one is chosen, or none where no tile can run.
inline std::vector<ConvTileVerdict> choose_conv_tile(const ConvProblemShape& p) {
    constexpr double kOperationsPerClock = 4096, kL2BytesPerClock = 38, kSharedBytesPerClock = 128;
    std::vector<ConvTileVerdict> verdicts;
    int best = -1;
    for (const ConvTileShape& tile : kConvTiles) {
        ConvTileVerdict verdict{&tile, false, 0, ""};
        if (p.num_sms < tile.cluster) {
            verdict.reason = "needs " + std::to_string(tile.cluster) + " multiprocessors, the grid has " +
                             std::to_string(p.num_sms);
        } else if (p.norm && tile.block_n < p.channels) {
            verdict.reason = "the norm needs all " + std::to_string(p.channels) + " channels in one tile";
        } else if (tile.unit_rows > 8 && p.channels > tile.block_n) {
            verdict.reason =
                "every 64 of " + std::to_string(p.channels) + " channels would fetch the pixels anew";
        } else if (!p.tall && tile.block_n == 64) {
            verdict.reason = "not compiled for " + std::to_string(p.taps_y) + " vertical taps";
        } else {
            const int64_t units = conv_units(p.frames, p.height, p.width, tile.unit_rows);
            const int64_t groups = (units + tile.units * tile.cluster - 1) / (tile.units * tile.cluster);
            const int64_t works = groups * p.phases * ((p.channels + tile.block_n - 1) / tile.block_n);
            const int64_t workers = p.num_sms / tile.cluster, rounds = (works + workers - 1) / workers;
            const int pixels = 8 * tile.unit_rows;
            const double math =
                2.0 * tile.units * pixels * tile.block_n * 64 * p.taps_y / kOperationsPerClock;
            const double box = tile.units * (tile.unit_rows + p.taps_y - 1.0) * 1024,
                         weights = p.taps_y * tile.block_n * 128.0;
            const double loads = (box + weights / tile.cluster) / kL2BytesPerClock;
            // A product reads both operands, a unit of pixels and all channels.
            const double reads = tile.units * p.taps_y * double(pixels + tile.block_n) * 128;
            const double shared = (reads + box + weights) / kSharedBytesPerClock;
            const double bound = std::max({math, loads, shared});
            verdict.clocks = rounds * bound;
            verdict.reason = std::to_string(rounds) + " rounds of " + std::to_string(workers) + " for " +
                             std::to_string(works) + " tiles, bound by " +
                             (bound == math    ? "products"
                              : bound == loads ? "L2"
                                               : "shared memory") +
                             ": " + std::to_string(static_cast<int64_t>(verdict.clocks)) + " clocks per box";
            if (best < 0 || verdict.clocks < verdicts[best].clocks) best = static_cast<int>(verdicts.size());
        }
        verdicts.push_back(verdict);
    }
    if (best >= 0) verdicts[best].chosen = true;
    return verdicts;
}

}  // namespace magihuman
