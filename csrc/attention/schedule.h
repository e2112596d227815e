// Which query tile visits which key tiles: pure functions, the same in every role and on the host.
//
// Queries go in tiles of kBlockM rows. Full attention: every tile sees the keys [0, rows). Frame window: there are
// tiles of video rows, and tiles of audio and text rows, which see everything. A video tile (or pair of them) whose
// rows lie in the frames f0 .. f1 sees two spans of keys in one softmax,
//   the video rows of the frames f0 - radius .. f1 + radius, clipped, and the audio and text rows,
// or one span where they touch and no row's window ends before them.
//
// Key tiles of a span end where the span ends, and are counted from there: only the first one may begin too early.
// So nothing behind a span is ever read, rows that are not in use can hold anything, and rows before the first
// one are the copy engine's zeros.
#pragma once

#include "hopper/device.h"

namespace magihuman::attention {

constexpr int kBlockM = 128;

struct KeySpan {
    int begin, end;
};

// Rows in use, as the offsets in device memory say, and what of them is computed.
struct Tokens {
    int video, rows, queries;
    int frame;   // video rows of one latent frame; 0: full attention
    int radius;  // frames seen on either side

    __host__ __device__ int frames() const { return (video + frame - 1) / frame; }
    // The video rows that a row of this frame sees.
    __host__ __device__ KeySpan window(int first, int last) const {
        return {max(first - radius, 0) * frame, min(min(last + radius, frames() - 1) * frame + frame, video)};
    }
};

// One tile of queries and what it visits. Spans may be empty.
struct QueryTile {
    int row, end;       // rows; none where they are equal
    KeySpan near, far;  // the video window (or everything), audio and text
    KeySpan common;     // of `near`, the keys that all rows of the tile see
    bool windowed;      // rows differ in what they see of `near`

    __host__ __device__ int near_tiles(int block_n) const {
        return (near.end - near.begin + block_n - 1) / block_n;
    }
    __host__ __device__ int key_tiles(int block_n) const {
        return near_tiles(block_n) + (far.end - far.begin + block_n - 1) / block_n;
    }
    // First key of key tile `j`; before the span's begin, and then maybe negative, in its first tile only.
    __host__ __device__ int key_start(int j, int block_n) const {
        const int tiles = near_tiles(block_n);
        return j < tiles ? near.end - (tiles - j) * block_n : far.end - (key_tiles(block_n) - j) * block_n;
    }
    // Whether key tile `j` holds keys that some row must not see.
    __host__ __device__ bool masked(int j, int block_n) const {
        const int start = key_start(j, block_n);
        if (j >= near_tiles(block_n)) return start < far.begin;
        return start < common.begin || start + block_n > common.end;
    }
    // The keys of key tile `j` that `row` sees lie in this range.
    __host__ __device__ KeySpan visible(int j, int block_n, int row, const Tokens& tokens) const {
        if (j >= near_tiles(block_n)) return far;
        if (!windowed) return near;
        const int of = min(row, end - 1) / tokens.frame;
        const KeySpan window = tokens.window(of, of);
        return {window.begin, max(window.end, common.end)};
    }
};

// What one block does in one unit of work: a query tile of one head.
struct Assignment {
    QueryTile tile;  // without rows where the block only helps its pair
    int q_head, kv_head;
    bool shared;  // the unit's blocks visit the same tiles of the same keys and values
};

// All units, each for a cluster of kCluster blocks: a pair, or one block alone. The blocks of a unit visit equally many
// key tiles, and but for one kind the same ones, so that each fetches half of them for both:
//   1. of the tiles that see everything any two of one kv head, whatever their rows and query heads. Where a kv head
//      has an odd one left, those of two kv heads make a unit that shares nothing;
//   2. of video tiles two neighbours, whose windows are then taken together.
// Long ones first, but kv head after kv head: blocks that run together read the same keys and values, which then lie
// in L2.
template <int kCluster>
class Schedule {
  public:
    __host__ __device__ Schedule(const Tokens& tokens, int q_heads, int kv_heads)
        : tokens_(tokens), kv_heads_(kv_heads), group_(q_heads / kv_heads) {
        const bool windowed = tokens.frame > 0;
        first_other_ = windowed ? tokens.video : 0;
        const int others = (max(tokens.queries - first_other_, 0) + kBlockM - 1) / kBlockM;
        entries_ = others * group_;
        odd_units_ = entries_ % kCluster > 0 ? (kv_heads + kCluster - 1) / kCluster : 0;
        video_tiles_ = windowed ? (tokens.video + kUnitRows - 1) / kUnitRows : 0;
        per_kv_head_ = entries_ / kCluster + video_tiles_ * group_;
    }

    __host__ __device__ int units() const { return odd_units_ + per_kv_head_ * kv_heads_; }

    // `unit`: 0 .. units() - 1. `rank`: of the block in its cluster.
    __host__ __device__ Assignment get(int unit, int rank) const {
        if (unit < odd_units_) {
            const int kv_head = unit * kCluster + rank, last = kv_heads_ - 1;
            Assignment found = other(entries_ - 1, min(kv_head, last));
            found.shared = unit * kCluster == last;
            if (kv_head > last) found.tile.row = found.tile.end;
            return found;
        }
        unit -= odd_units_;
        const int kv_head = unit / per_kv_head_, rest = unit - kv_head * per_kv_head_;
        if (rest < entries_ / kCluster) return other(rest * kCluster + rank, kv_head);
        const int video = rest - entries_ / kCluster, order = video / group_;
        // From the middle of the clip outwards: windows at its ends are shorter.
        const int middle = (video_tiles_ - 1) / 2;
        const int tile = order % 2 == 1 ? middle + (order + 1) / 2 : middle - order / 2;
        return {video_tile(tile, rank), kv_head * group_ + video - order * group_, kv_head, true};
    }

  private:
    static constexpr int kUnitRows = kBlockM * kCluster;

    // Entries are query tiles, for each the query heads of one kv head.
    __host__ __device__ Assignment other(int entry, int kv_head) const {
        const int tile = entry / group_, row = first_other_ + tile * kBlockM, rows = tokens_.rows;
        return {{row, min(row + kBlockM, tokens_.queries), {0, rows}, {rows, rows}, {0, rows}, false},
                kv_head * group_ + entry - tile * group_,
                kv_head,
                true};
    }

    __host__ __device__ QueryTile video_tile(int tile, int rank) const {
        const int begin = tile * kUnitRows, end = min(begin + kUnitRows, tokens_.video);
        const int first = begin / tokens_.frame, last = (end - 1) / tokens_.frame, rows = tokens_.rows;
        const int row = min(begin + rank * kBlockM, end);
        QueryTile found{
            row,          min(row + kBlockM, end), tokens_.window(first, last), {tokens_.video, rows}, {0, 0},
            first != last};
        found.common = {tokens_.window(last, last).begin, tokens_.window(first, first).end};
        if (found.common.end == tokens_.video) {
            // No row's window ends before the audio rows: go on into them.
            found.near.end = found.common.end = rows;
            found.far.begin = rows;
        }
        return found;
    }

    Tokens tokens_;
    int kv_heads_, group_, first_other_, entries_, odd_units_, video_tiles_, per_kv_head_;
};

}  // namespace magihuman::attention
