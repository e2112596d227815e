// Which query tile visits which key tiles: pure functions, the same in every role and on the host.
//
// Queries go in tiles of kBlockM rows. Full attention: one list of tiles, each sees the keys [0, rows).
// Frame window: tiles of video rows, and after them tiles of audio and text rows, which see everything. A video
// tile whose rows lie in the frames f0 .. f1 sees two spans of keys in one softmax,
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
    int row, end;       // rows
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

// All tiles, the long ones first.
class Schedule {
  public:
    __host__ __device__ explicit Schedule(const Tokens& tokens) : tokens_(tokens) {
        video_tiles_ = tokens.frame == 0 ? 0 : (tokens.video + kBlockM - 1) / kBlockM;
        first_other_ = tokens.frame == 0 ? 0 : tokens.video;
        other_tiles_ = (max(tokens.queries - first_other_, 0) + kBlockM - 1) / kBlockM;
    }

    __host__ __device__ int tiles() const { return other_tiles_ + video_tiles_; }

    // `index`: 0 .. tiles() - 1.
    __host__ __device__ QueryTile tile(int index) const {
        const int rows = tokens_.rows;
        if (index < other_tiles_) {
            const int row = first_other_ + index * kBlockM;
            return {row, min(row + kBlockM, tokens_.queries), {0, rows}, {rows, rows}, {0, rows}, false};
        }
        // From the middle of the clip outwards: windows at its ends are shorter.
        const int i = index - other_tiles_, middle = (video_tiles_ - 1) / 2;
        const int row = (i % 2 == 1 ? middle + (i + 1) / 2 : middle - i / 2) * kBlockM;
        const int end = min(row + kBlockM, tokens_.video);
        const int first = row / tokens_.frame, last = (end - 1) / tokens_.frame;
        QueryTile tile{row, end, tokens_.window(first, last), {tokens_.video, rows}, {0, 0}, first != last};
        tile.common = {tokens_.window(last, last).begin, tokens_.window(first, first).end};
        if (tile.common.end == tokens_.video) {
            // No row's window ends before the audio rows: go on into them.
            tile.near.end = tile.common.end = rows;
            tile.far.begin = rows;
        }
        return tile;
    }

  private:
    Tokens tokens_;
    int video_tiles_, first_other_, other_tiles_;
};

}  // namespace magihuman::attention
