// head: velocity = rms_norm(x) weightT, float32; video rows [Nv, 4 C] unpatched to [C, T, H, W], audio rows as they
// are, text rows dropped. Token channels: (ph, pw, c), c fastest (not the embedder's order).
//
// Bound by float32 arithmetic (video: 2 Nv H 192 operations). One pass over x: the tile product multiplies
// x (1 + norm) while the same loads add up x^2, and the row's scale is applied to the sums. Persistent over 64 x 64
// tiles; the three column tiles of a row block are neighbours in time, so that x comes from memory once.
//
// Shared memory: the product's stages, then sums of squares [128].
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "hopper/launch.h"
#include "hopper/numeric.h"
#include "pointwise/float32_product.cuh"
#include "pointwise/latent_grid.h"

namespace magihuman {
namespace {

namespace product = float32_product;

constexpr uint32_t kSharedBytes = product::kSharedBytes + product::kThreads * sizeof(float);

// sum = rms_norm(x[row ..]) weight[column ..]T of this tile; x: row 0 of the modality.
HOPPER_INLINE void project(const HeadParams& p, const float* x, int row, int rows, const float* norm,
                           const float* weight, int column, int columns,
                           float (&sum)[product::kRows][product::kColumns]) {
    auto* squares = reinterpret_cast<float*>(dynamic_shared_memory() + product::kSharedBytes);
    const int x_row = row + product::load_row(), weight_row = column + product::load_row();
    const float* a = x_row < rows ? x + x_row * p.ldx : nullptr;
    const float* b = weight_row < columns ? weight + int64_t{weight_row} * p.h : nullptr;
    float square = 0;
    const auto load_scaled = [&](int k, float (&to)[8]) {
        float scale[8];
        product::load_8(a, k, p.h, to);
        product::load_8(norm, k, p.h, scale);
        float some = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            some = fmaf(to[i], to[i], some);
            to[i] *= 1 + scale[i];
        }
        square += some;
    };
    product::multiply(p.h, load_scaled, [&](int k, float (&to)[8]) { product::load_8(b, k, p.h, to); }, sum);
    // Two threads each hold half of a row's squares.
    store_shared(squares + threadIdx.x, square);
    block_sync();
#pragma unroll
    for (int i = 0; i < product::kRows; ++i) {
        const int at = product::first_row() + i;
        const float total =
            load_shared<float>(squares + at) + load_shared<float>(squares + product::kTile + at);
        const float scale = fast_rsqrt(total / static_cast<float>(p.h) + p.eps);
#pragma unroll
        for (int j = 0; j < product::kColumns; ++j) sum[i][j] *= scale;
    }
    // The next tile's squares come after the barriers of its product.
}

__global__ void __launch_bounds__(product::kThreads, product::kBlocksPerProcessor)
    head_sm90(const __grid_constant__ HeadParams p) {
    role("tile");
    const ModalityRanges ranges = load_ranges(p.modality_offsets, p.m);
    const int video_rows = min(min(ranges.first_audio, ranges.rows), token_count(p.grid));
    const int audio_rows = min(min(ranges.first_text, ranges.rows) - ranges.first_audio, p.audio_rows);
    const int video_channels = 4 * p.grid.channels;
    const int video_columns = (video_channels + product::kTile - 1) / product::kTile;
    const int audio_columns = (p.audio_channels + product::kTile - 1) / product::kTile;
    const int video_tiles = (video_rows + product::kTile - 1) / product::kTile * video_columns;
    const int audio_tiles = (audio_rows + product::kTile - 1) / product::kTile * audio_columns;
    float sum[product::kRows][product::kColumns];
    for (int tile = static_cast<int>(blockIdx.x); tile < video_tiles + audio_tiles;
         tile += static_cast<int>(gridDim.x)) {
        if (tile < video_tiles) {
            const int row = tile / video_columns * product::kTile,
                      column = tile % video_columns * product::kTile;
            project(p, p.x, row, video_rows, p.video_norm, p.video_weight, column, video_channels, sum);
#pragma unroll
            for (int i = 0; i < product::kRows; ++i) {
                const int token = row + product::first_row() + i;
                if (token >= video_rows) continue;
                float* to = p.video + token_offset(p.grid, token);
#pragma unroll
                for (int j = 0; j < product::kColumns; ++j) {
                    const int n = column + product::first_column() + j;
                    if (n >= video_channels) continue;
                    const int place = n / p.grid.channels, c = n % p.grid.channels;
                    store_global(to + c * channel_stride(p.grid) + place / 2 * p.grid.width + place % 2,
                                 sum[i][j]);
                }
            }
        } else {
            const int index = tile - video_tiles;
            const int row = index / audio_columns * product::kTile,
                      column = index % audio_columns * product::kTile;
            project(p, p.x + ranges.first_audio * p.ldx, row, audio_rows, p.audio_norm, p.audio_weight,
                    column, p.audio_channels, sum);
            const int n = column + product::first_column();
            if (n >= p.audio_channels) continue;
#pragma unroll
            for (int i = 0; i < product::kRows; ++i) {
                const int at = row + product::first_row() + i;
                if (at >= audio_rows) continue;
                store_global(reinterpret_cast<float4*>(p.audio + int64_t{at} * p.audio_channels + n),
                             make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
            }
        }
    }
}

}  // namespace

void launch_head(const HeadParams& p, Stream stream) {
    const Arguments check("head");
    check_grid(check, p.grid);
    check.require(p.m >= 0, "m", "at least 0", p.m);
    check.require(p.h >= 8 && p.h % 8 == 0, "h", "a multiple of 8, at least 8", p.h);
    check.require(p.ldx >= p.h && p.ldx % 4 == 0, "ldx", "a multiple of 4, at least h", p.ldx);
    check.require(p.audio_rows >= 0, "audio_rows", "at least 0", p.audio_rows);
    check.require(p.audio_channels >= 4 && p.audio_channels % 4 == 0, "audio_channels",
                  "a multiple of 4, at least 4", p.audio_channels);
    check.require_pointer(p.x, "x", 16);
    check.require_pointer(p.video_norm, "video_norm", 16);
    check.require_pointer(p.audio_norm, "audio_norm", 16);
    check.require_pointer(p.video_weight, "video_weight", 16);
    check.require_pointer(p.audio_weight, "audio_weight", 16);
    check.require_pointer(p.video, "video", 4);
    // A tensor without rows has no address.
    if (p.audio_rows > 0) check.require_pointer(p.audio, "audio", 16);
    check.require_pointer(p.modality_offsets, "modality_offsets", 4);
    if (p.m == 0) return;
    const int64_t row_blocks = int64_t{p.m} / product::kTile + 2;
    const int64_t columns =
        (std::max(4 * p.grid.channels, p.audio_channels) + product::kTile - 1) / product::kTile;
    const int64_t blocks =
        std::min(row_blocks * columns, int64_t{processors(p.num_sms)} * product::kBlocksPerProcessor);
    const LaunchConfig config{
        "head_sm90", dim3(static_cast<uint32_t>(blocks)), product::kThreads, 1, kSharedBytes, stream};
    launch(head_sm90, config, p);
}

}  // namespace magihuman
