// Where the latents of a video token lie in [C, T, H, W].
#pragma once

#include "api.h"
#include "common/arguments.h"
#include "hopper/device.h"

namespace magihuman {

__host__ __device__ inline int token_count(const LatentGrid& grid) {
    return grid.frames * (grid.height / 2) * (grid.width / 2);
}

// Elements from one channel to the next.
__host__ __device__ inline int64_t channel_stride(const LatentGrid& grid) {
    return int64_t{grid.frames} * grid.height * grid.width;
}

// Offset of a token's first latent (ph = pw = 0) in channel 0.
__host__ __device__ inline int64_t token_offset(const LatentGrid& grid, int token) {
    const int columns = grid.width / 2, per_frame = grid.height / 2 * columns;
    const int frame = token / per_frame, row = token % per_frame / columns, column = token % columns;
    return (int64_t{frame} * grid.height + 2 * row) * grid.width + 2 * column;
}

inline void check_grid(const Arguments& check, const LatentGrid& grid) {
    check.require(grid.channels >= 2 && grid.channels % 2 == 0, "grid.channels", "even, at least 2",
                  grid.channels);
    check.require(grid.frames >= 1, "grid.frames", "at least 1", grid.frames);
    check.require(grid.height >= 2 && grid.height % 2 == 0, "grid.height", "even, at least 2", grid.height);
    check.require(grid.width >= 2 && grid.width % 2 == 0, "grid.width", "even, at least 2", grid.width);
}

}  // namespace magihuman
