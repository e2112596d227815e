// Which tile comes next: the same list in every role, made from the row ranges that lie in device memory.
//
// A unit of work belongs to one cluster of kCluster blocks (a pair, or one block alone). The list, range by range:
//   whole units   pairs of tiles along M, which share the weight tile: bands of kBand pairs, M fastest, so that blocks
//                 running together share rows and weights in L2
//   odd units     the odd last row of tiles, paired along N: these share the rows. Each comes right after the whole
//                 units of its two columns in the range's last band, while those weights lie in L2. A range of a single
//                 row of tiles has no such band: its units ride on the first one that exists, else they would all come
//                 at once and wait for memory
// Then the narrow tiles at the end of N, where the epilogue has such: what is short fills the last round.
//
// A round deals one unit to each cluster. An odd one takes about 0.65 of a whole one, so odd units go to clusters 0, 1,
// 2, .. in turn: those are the ones with a unit in the last, partial round.
//
// A tile that straddles the end of its range reads on into the next one, and never stores those rows.
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

    // For the block `rank` of cluster number `cluster` out of `clusters`.
    HOPPER_INLINE Scheduler(const TileList& list, const ModalityRanges& ranges, int rank, int cluster,
                            int clusters)
        : list_(list),
          rank_(rank),
          cluster_(cluster),
          clusters_(clusters),
          bound1_(list.groups == 1 ? ranges.rows : ranges.first_audio),
          bound2_(ranges.first_text),
          bound3_(ranges.rows) {
        if constexpr (kCluster > 1) find_odd_rows();
    }

    // The tile of the next round; false at the end of the list.
    HOPPER_INLINE bool next(Tile& tile) {
        const int begin = begin_, odd_before = odd_;
        int all = 0;
#pragma unroll
        for (int g = 0; g < kMaxGroups; ++g) all += units(g);
        const int size =
            min(all - begin, clusters_);  // of this round; less than 1 where only narrow ones are left
        begin_ += clusters_;
        tile.narrow = false;
        if (cluster_ >= size) return narrow_tile(tile, cluster_ - size);
        odd_ = odd_units(begin + size);
        // Odd units go to clusters first, first + 1, .., whole ones to those that follow, around the round's end.
        const int odd = odd_ - odd_before;
        int at = cluster_;
        if (odd > 0) {
            const int first = odd_before % clusters_;
            if (first < size) at -= first;
            if (at < 0) at += size;
            if (at < odd) return odd_tile(tile, odd_before + at);
        }
        return whole_tile(tile, begin - odd_before + at - odd);
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

    HOPPER_INLINE int pairs(int group) const { return tiles_m(group) / kCluster; }
    HOPPER_INLINE int column_pairs() const { return (list_.n_tiles + kCluster - 1) / kCluster; }

    // How many odd rows of tiles come with the last band of a range, and the ranges that they belong to, counted
    // through all bands: two bits each.
    HOPPER_INLINE int riders(int group) const { return kCluster == 1 ? 0 : riders_ >> 2 * group & 3; }
    HOPPER_INLINE int range_of_odd_row(int i) const { return odd_rows_ >> 2 * i & 3; }

    HOPPER_INLINE void find_odd_rows() {
        const int carrier = pairs(0) > 0 ? 0 : pairs(1) > 0 ? 1 : pairs(2) > 0 ? 2 : 0;
        int shift = 0;
#pragma unroll
        for (int g = 0; g < kMaxGroups; ++g) {
#pragma unroll
            for (int h = 0; h < kMaxGroups; ++h) {
                const bool lone = tiles_m(h) == 1, own = g == h && !lone && tiles_m(h) % kCluster != 0;
                if (own || (lone && g == carrier)) {
                    riders_ += 1 << 2 * g;
                    odd_rows_ |= h << shift;
                    shift += 2;
                }
            }
        }
    }

    HOPPER_INLINE int odd_units_of(int group) const { return riders(group) * column_pairs(); }
    HOPPER_INLINE int whole_units_of(int group) const { return pairs(group) * list_.n_tiles; }
    HOPPER_INLINE int units(int group) const { return whole_units_of(group) + odd_units_of(group); }

    // The range that `unit` of a list falls in; `unit` becomes its number there. Beyond the end: the last range.
    template <typename Count>
    HOPPER_INLINE static int find_range(int& unit, const Count& count) {
        int group = 0;
#pragma unroll
        for (int g = 0; g < kMaxGroups - 1; ++g) {
            if (group == g && unit >= count(g)) {
                unit -= count(g);
                group = g + 1;
            }
        }
        return group;
    }

    // How many of the first `position` units of the list are odd.
    HOPPER_INLINE int odd_units(int position) const {
        if constexpr (kCluster == 1) return 0;
        const int group = find_range(position, [&](int g) { return units(g); });
        int odd = 0;
#pragma unroll
        for (int g = 0; g < kMaxGroups - 1; ++g) odd += g < group ? odd_units_of(g) : 0;
        if (position >= units(group)) return odd + odd_units_of(group);
        const int before = max(pairs(group) - 1, 0) / kBand * kBand, size = pairs(group) - before;
        const int in_band = position - before * list_.n_tiles;
        if (in_band <= 0 || riders(group) == 0) return odd;
        const int period = kCluster * size + riders(group), steps = in_band / period;
        const int columns = min(list_.n_tiles - steps * kCluster, kCluster);
        return odd + steps * riders(group) + max(in_band - steps * period - columns * size, 0);
    }

    HOPPER_INLINE bool whole_tile(Tile& tile, int unit) const {
        const int group = find_range(unit, [&](int g) { return whole_units_of(g); });
        const int first = unit / (kBand * list_.n_tiles) * kBand;
        const int size = min(pairs(group) - first, kBand), rest = unit - first * list_.n_tiles;
        const int column = rest / size;
        tile.shared = Shared::kWeights;
        return fill(tile, group, (first + rest - column * size) * kCluster + rank_, column);
    }

    HOPPER_INLINE bool odd_tile(Tile& tile, int unit) const {
        const int group = find_range(unit, [&](int g) { return odd_units_of(g); });
        const int step = unit / riders(group);
        int row = unit - step * riders(group);
#pragma unroll
        for (int g = 0; g < kMaxGroups - 1; ++g) row += g < group ? riders(g) : 0;
        tile.shared = Shared::kRows;
        return fill(tile, range_of_odd_row(row), tiles_m(range_of_odd_row(row)) - 1, step * kCluster + rank_);
    }

    HOPPER_INLINE bool narrow_tile(Tile& tile, int unit) const {
        if (list_.narrow == 0) return false;
        const auto units = [&](int g) { return (tiles_m<kNarrowM>(g) + kCluster - 1) / kCluster; };
        const int group = find_range(unit, units);
        if (unit >= units(group)) return false;
        tile.narrow = true;
        tile.shared = Shared::kWeights;
        return fill<kNarrowM>(tile, group, unit * kCluster + rank_, list_.n_tiles);
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
    int rank_, cluster_, clusters_, bound1_, bound2_, bound3_;
    int riders_ = 0, odd_rows_ = 0;
    int begin_ = 0, odd_ = 0;  // units of the rounds so far, and how many of them are odd
};

}  // namespace magihuman::gemm
