// From accumulators to bf16 rows in global memory: each warp turns its 16 rows through a staging area of its
// own, so that 16 bytes a lane leave as whole lines. No other warp takes part, hence no barrier, and rows and
// columns beyond the end are masked here and nowhere else.
//
// Staging: 16 rows of 256 bytes; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), which keeps both the
// column-wise writes and the row-wise reads free of bank conflicts.
#pragma once

#include "hopper/memory.h"
#include "hopper/numeric.h"
#include "hopper/warp.h"

namespace magihuman::gemm {

// One warp's share of a tile: 16 rows, of which `rows` are stored (none if it is not positive).
struct WarpTile {
    int group, row, rows, column;
    uint8_t* staging;
    uint32_t lane;
};

// The same number, of unknown origin to the compiler: what is computed from it cannot be computed earlier.
HOPPER_INLINE uint32_t opaque(uint32_t value) {
#if !defined(MAGIHUMAN_SIM)
    asm volatile("" : "+r"(value));
#endif
    return value;
}

constexpr int kWarpRows = 16, kStagedColumns = 128;

HOPPER_INLINE uint8_t* staged(uint8_t* staging, uint32_t row, uint32_t chunk) {
    return staging + row * (kStagedColumns * 2) + (chunk ^ row % 8) * 16;
}

// Packed pairs of 16 columns, as four registers of two accumulator blocks, to columns 16j .. of the staging.
HOPPER_INLINE void stage_columns(const WarpTile& tile, uint32_t j, uint32_t m0, uint32_t m1, uint32_t m2,
                                 uint32_t m3) {
    stmatrix_x4(staged(tile.staging, tile.lane % 16, 2 * j + tile.lane / 16), m0, m1, m2, m3);
}

// The staged rows to d (the address of the warp's first row and column). `columns`: how many exist from there
// on, any number.
template <int kColumns>
HOPPER_INLINE void store_staged(const WarpTile& tile, bf16* d, int64_t pitch, int columns) {
    static_assert(kColumns % 16 == 0 && kColumns <= kStagedColumns);
    constexpr uint32_t kChunks = kColumns / 8;  // of a row
    constexpr uint32_t kRounds = kWarpRows * kChunks / 32;
    warp_sync();
    if (tile.rows >= kWarpRows && columns >= kColumns) {
        // Nearly every tile: no masks, and all loads under way before the first store.
        uint4 line[kRounds];
#pragma unroll
        for (uint32_t i = 0; i < kRounds; ++i) {
            const uint32_t at = i * 32 + tile.lane;
            line[i] = load_shared<uint4>(staged(tile.staging, at / kChunks, at % kChunks));
        }
#pragma unroll
        for (uint32_t i = 0; i < kRounds; ++i) {
            const uint32_t at = i * 32 + tile.lane;
            store_global(reinterpret_cast<uint4*>(d + at / kChunks * pitch + at % kChunks * 8), line[i]);
        }
    } else {
#pragma unroll 1
        for (uint32_t at = tile.lane; at < kWarpRows * kChunks; at += 32) {
            const uint32_t row = at / kChunks, chunk = at % kChunks;
            const int left = columns - static_cast<int>(chunk) * 8;
            if (static_cast<int>(row) >= tile.rows || left <= 0) continue;
            const uint8_t* from = staged(tile.staging, row, chunk);
            bf16* to = d + row * pitch + chunk * 8;
            if (left >= 8) {
                store_global(reinterpret_cast<uint4*>(to), load_shared<uint4>(from));
            } else {
#pragma unroll 1
                for (int c = 0; c < left; ++c) store_global(to + c, load_shared<bf16>(from + c * 2));
            }
        }
    }
    warp_sync();
}

}  // namespace magihuman::gemm
