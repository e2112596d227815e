// Which tile comes next: the same list in every role, made from the row ranges that lie in device memory.
//
// A unit of work belongs to one cluster of kCluster blocks (a pair, or one block alone). In this order:
//   1. pairs of tiles along M of each range, which share the weight tile: bands of kBand pairs, M fastest, so
//      that blocks running together share rows and weights in L2;
//   2. the odd last row of tiles of each range, paired along N: these share the rows;
//   3. the narrow tiles at the end of N, where the epilogue has such.
// Costly first: what is short fills the last round. A tile that straddles the end of its range reads on into
// the next one, and never stores those rows.
#pragma once

#include "common/modality.h"

namespace magihuman::gemm {

constexpr int kBlockM = 128, kMaxGroups = 3;
// Rows of a narrow tile: fetching A is all it costs, so many small ones share the last round.
constexpr int kNarrowM = 64;

struct TileList {
    const int* modality_offsets;  // device, int32[4]: 0, Nv, Nv + Na, L; null: one range of m rows
    int m, groups;
    int n_tiles;  // along N, of BLOCK_N columns
    int narrow;   // 1: one further tile of few columns after them
    int block_n;
};

enum class Shared : uint32_t { kWeights, kRows };

// One block's tile.
struct Tile {
    int group, row, column;  // first row of A and first column of the expert's N
    int rows;                // to be stored, 0..kBlockM; 0: the block only helps its pair
    int a_rows;              // of A that are needed here: `rows`, or in a pair that shares them the pair's
    bool narrow;
    Shared shared;  // what the pair has in common
};

template <int kCluster>
class Scheduler {
  public:
    static constexpr int kBand = 16 / kCluster;

    // `unit` advances from the cluster's number by the number of clusters.
    HOPPER_INLINE Scheduler(const TileList& list, int rank) : list_(list), rank_(rank) {
        const ModalityRanges ranges = load_ranges(list.modality_offsets, list.m);
        bound1_ = list.groups == 1 ? ranges.rows : ranges.first_audio;
        bound2_ = ranges.first_text;
        bound3_ = ranges.rows;
    }

    // False at the end of the list.
    HOPPER_INLINE bool get(int unit, Tile& tile) const {
        const int n_tiles = list_.n_tiles;
        tile.narrow = false;
        tile.shared = Shared::kWeights;
#pragma unroll
        for (int g = 0; g < kMaxGroups; ++g) {
            const int pairs = tiles_m(g) / kCluster;
            if (unit < pairs * n_tiles) {
                const int band = unit / (kBand * n_tiles), first = band * kBand;
                const int size = min(pairs - first, kBand), rest = unit - first * n_tiles;
                return fill(tile, g, (first + rest % size) * kCluster + rank_, rest / size);
            }
            unit -= pairs * n_tiles;
        }
        if constexpr (kCluster > 1) {
            tile.shared = Shared::kRows;
#pragma unroll
            for (int g = 0; g < kMaxGroups; ++g) {
                const int units = tiles_m(g) % kCluster != 0 ? (n_tiles + kCluster - 1) / kCluster : 0;
                if (unit < units) return fill(tile, g, tiles_m(g) - 1, unit * kCluster + rank_);
                unit -= units;
            }
            tile.shared = Shared::kWeights;
        }
        if (list_.narrow == 0) return false;
        tile.narrow = true;
#pragma unroll
        for (int g = 0; g < kMaxGroups; ++g) {
            const int units = (tiles_m<kNarrowM>(g) + kCluster - 1) / kCluster;
            if (unit < units) return fill<kNarrowM>(tile, g, unit * kCluster + rank_, n_tiles);
            unit -= units;
        }
        return false;
    }

  private:
    // Not an array: an index that is not constant would put it in local memory.
    HOPPER_INLINE int bound(int i) const {
        return i == 0 ? 0 : i == 1 ? bound1_ : i == 2 ? bound2_ : bound3_;
    }

    template <int kRows = kBlockM>
    HOPPER_INLINE int tiles_m(int group) const {
        return group < list_.groups ? (bound(group + 1) - bound(group) + kRows - 1) / kRows : 0;
    }

    template <int kRows = kBlockM>
    HOPPER_INLINE bool fill(Tile& tile, int group, int tile_m, int tile_n) const {
        tile.group = group;
        tile.row = bound(group) + tile_m * kRows;
        tile.column = tile_n * list_.block_n;
        tile.a_rows = max(min(bound(group + 1) - tile.row, kRows), 0);
        tile.rows = tile_n < list_.n_tiles || tile.narrow ? tile.a_rows : 0;
        return true;
    }

    const TileList& list_;
    int rank_, bound1_, bound2_, bound3_;
};

}  // namespace magihuman::gemm
