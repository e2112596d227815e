// Which pixels a block computes, and where they lie in memory.
//
// A unit is a column of the picture of one frame, 8 pixels wide and `unit_rows` high: 8 x 8 are the 64 rows of one
// product, 8 x 32 the 256 columns of one. Eight pixels of a row of the picture, 128 bytes of channels each, are one
// period of the 128-byte swizzle, so the same box of pixels, read one period further on, is the neighbourhood one row
// of the picture below: a box of unit_rows + taps_y - 1 rows serves all vertical taps, at starts that every descriptor
// may have.
//
// Units are counted x fastest, then y, then frames; a block takes neighbours. Blocks count their tiles output
// channels first, then phases, then units: what runs together reads the same pixels.
#pragma once

#include "hopper/device.h"
#include "hopper/numeric.h"

namespace magihuman::conv {

constexpr int kUnitSide = 8;

// The grid of output pixels before any upsampling, and the taps around each.
struct Grid {
    int height, width;
    int length;  // frames of the clip: time taps beyond its ends read its first and last one
    int first;   // the first frame computed
    int unit_rows, tiles_y, tiles_x, units;
    int x_frames;                      // frames that the input buffer holds: frame t lies at t % x_frames
    int taps_t, taps_x, chunks;        // boxes of a tile: time taps x horizontal taps x 64 channels
    int offset_t, offset_y, offset_x;  // of the first tap
    int phases, n_tiles, channels;     // output channels of a phase
    int tiles;                         // of a cluster: groups of units x phases x n_tiles
};

// What a nearest-neighbour upsampling leaves to a phase: each of four is a convolution of its own, shifted by
// its place among the 2 x 2 pixels it fills.
struct Shift {
    int y, x;
};
HOPPER_INLINE Shift shift_of(const Grid& grid, int phase) {
    return grid.phases == 4 ? Shift{phase / 2, phase % 2} : Shift{0, 0};
}

struct Tile {
    int group, phase, n_tile;  // group: of units, in this cluster's blocks
};

HOPPER_INLINE Tile tile_at(const Grid& grid, int index) {
    const int n_tile = index % grid.n_tiles, rest = index / grid.n_tiles;
    return {rest / grid.phases, rest % grid.phases, n_tile};
}

struct Unit {
    int t, y, x;  // frame of the clip, first row and column
    bool exists;
};

// Beyond the last unit: its pixels once more, not to be stored.
HOPPER_INLINE Unit unit_at(const Grid& grid, int index) {
    const int i = min(index, grid.units - 1);
    const int row = i / grid.tiles_x, frame = row / grid.tiles_y;
    return {grid.first + frame, (row - frame * grid.tiles_y) * grid.unit_rows,
            (i - row * grid.tiles_x) * kUnitSide, index < grid.units};
}

// Frames of pixels in memory: bf16 [frames][height][width][channels], frame t at t % frames.
struct Frames {
    bf16* data;  // null: not wanted
    int frames;
};

// Where an output pixel lies: at t time_scale + (the phase, if there are two) - drop, in a picture `scale` times
// as large as the grid.
struct Placement {
    int time_scale, drop, scale;
};

// One warp's share of a unit: two rows of eight pixels, of which `rows` x `columns` exist.
struct PixelTile {
    int t, y, x, phase;
    int rows, columns;
    int channel;  // the first one of the tile
    uint8_t* staging;
    uint32_t lane;
};

// The element of channel 0 of the tile's first pixel, and elements from there to other pixels.
struct PixelAddress {
    int64_t first, row_pitch;
    int pixel_pitch;
};
HOPPER_INLINE PixelAddress address_of(const Grid& grid, const Placement& place, const PixelTile& tile,
                                      int frames) {
    const Shift shift = shift_of(grid, tile.phase);
    const int t = (tile.t * place.time_scale + (grid.phases == 2 ? tile.phase : 0) - place.drop) % frames;
    const int64_t width = int64_t{grid.width} * place.scale, height = int64_t{grid.height} * place.scale;
    const int64_t row = t * height + tile.y * place.scale + shift.y;
    return {(row * width + tile.x * place.scale + shift.x) * grid.channels,
            width * place.scale * grid.channels, place.scale * grid.channels};
}

}  // namespace magihuman::conv
