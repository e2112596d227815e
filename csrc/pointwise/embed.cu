// embed: the residual stream x [L, H] at the first layer's input, float32. Video and audio rows are products with
// their embedder; the text rows, the same in every step, are made once per prompt by embed_text and copied here.
//
// Bound by float32 arithmetic (video: 2 Nv H 192 operations). Persistent over 64 x 64 tiles of video, then of audio;
// tiles never span two modalities. Columns run fastest, so that neighbours write neighbouring pieces of a row.
#include <algorithm>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "hopper/launch.h"
#include "pointwise/float32_product.cuh"
#include "pointwise/latent_grid.h"

namespace magihuman {
namespace {

namespace product = float32_product;

// out[row][column] = sum + bias for the rows and columns of this tile that exist. out: row 0 of the modality.
HOPPER_INLINE void store_tile(const float (&sum)[product::kRows][product::kColumns], int row, int rows,
                              int column, int h, const float* bias, float* out, int64_t ldx) {
    column += product::first_column();
    if (column >= h) return;
    const float4 b = load_global_constant(reinterpret_cast<const float4*>(bias + column));
#pragma unroll
    for (int i = 0; i < product::kRows; ++i) {
        const int at = row + product::first_row() + i;
        if (at >= rows) continue;
        store_global(reinterpret_cast<float4*>(out + at * ldx + column),
                     make_float4(sum[i][0] + b.x, sum[i][1] + b.y, sum[i][2] + b.z, sum[i][3] + b.w));
    }
}

// The tile of rows x columns at (row, column) of a modality whose tokens lie in rows of `depth` floats.
HOPPER_INLINE void embed_rows(const float* in, int depth, const float* weight, const float* bias, int row,
                              int rows, int column, int h, float* out, int64_t ldx) {
    const int in_row = row + product::load_row(), weight_row = column + product::load_row();
    const float* a = in_row < rows ? in + int64_t{in_row} * depth : nullptr;
    const float* b = weight_row < h ? weight + int64_t{weight_row} * depth : nullptr;
    float sum[product::kRows][product::kColumns];
    product::multiply(
        depth, [&](int k, float (&to)[8]) { product::load_8(a, k, depth, to); },
        [&](int k, float (&to)[8]) { product::load_8(b, k, depth, to); }, sum);
    store_tile(sum, row, rows, column, h, bias, out, ldx);
}

// The same for video: a token's 8 consecutive inputs are two channels of a 2 x 2 patch. Neighbouring threads
// load neighbouring tokens, so that each of the four pairs is read along a row of latents.
HOPPER_INLINE void embed_patches(const EmbedParams& p, int row, int rows, int column) {
    const int depth = 4 * p.grid.channels;
    const int token = row + product::load_row(), weight_row = column + product::load_row();
    const float* a = token < rows ? p.video + token_offset(p.grid, token) : nullptr;
    const float* b = weight_row < p.h ? p.video_weight + int64_t{weight_row} * depth : nullptr;
    float sum[product::kRows][product::kColumns];
    const auto load_patch = [&](int k, float (&to)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 pair = make_float2(0, 0);
            if (a != nullptr && k < depth) {
                const float* at = a + (k / 4 + i / 2) * channel_stride(p.grid) + i % 2 * p.grid.width;
                pair = load_global_constant(reinterpret_cast<const float2*>(at));
            }
            to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
        }
    };
    product::multiply(
        depth, load_patch, [&](int k, float (&to)[8]) { product::load_8(b, k, depth, to); }, sum);
    store_tile(sum, row, rows, column, p.h, p.video_bias, p.x, p.ldx);
}

__global__ void __launch_bounds__(product::kThreads, product::kBlocksPerProcessor)
    embed_sm90(const __grid_constant__ EmbedParams p) {
    role("tile");
    const ModalityRanges ranges = load_ranges(p.modality_offsets, p.m);
    const int video_rows = min(min(ranges.first_audio, ranges.rows), token_count(p.grid));
    const int audio_rows = min(min(ranges.first_text, ranges.rows) - ranges.first_audio, p.audio_rows);
    const int text_rows = min(ranges.rows - ranges.first_text, p.text_rows);
    const int columns = (p.h + product::kTile - 1) / product::kTile;
    const int video_tiles = (video_rows + product::kTile - 1) / product::kTile * columns;
    const int audio_tiles = (audio_rows + product::kTile - 1) / product::kTile * columns;
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (int tile = block; tile < video_tiles + audio_tiles; tile += blocks) {
        const bool is_video = tile < video_tiles;
        const int index = is_video ? tile : tile - video_tiles;
        const int row = index / columns * product::kTile, column = index % columns * product::kTile;
        if (is_video) {
            embed_patches(p, row, video_rows, column);
        } else {
            embed_rows(p.audio, p.audio_channels, p.audio_weight, p.audio_bias, row, audio_rows, column, p.h,
                       p.x + ranges.first_audio * p.ldx, p.ldx);
        }
    }
    role("text");
    float* out = p.x + ranges.first_text * p.ldx;
    const int vectors = p.h / 4;
    for (int row = block; row < text_rows; row += blocks) {
        for (int i = static_cast<int>(threadIdx.x); i < vectors; i += product::kThreads) {
            const float4 value =
                load_global_constant(reinterpret_cast<const float4*>(p.text) + int64_t{row} * vectors + i);
            store_global(reinterpret_cast<float4*>(out + row * p.ldx) + i, value);
        }
    }
}

__global__ void __launch_bounds__(product::kThreads, product::kBlocksPerProcessor)
    embed_text_sm90(const __grid_constant__ EmbedTextParams p) {
    role("tile");
    const int columns = (p.h + product::kTile - 1) / product::kTile;
    const int tiles = (p.rows + product::kTile - 1) / product::kTile * columns;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        const int row = tile / columns * product::kTile, column = tile % columns * product::kTile;
        embed_rows(p.text, p.channels, p.weight, p.bias, row, p.rows, column, p.h, p.out, p.h);
    }
}

uint32_t blocks_for(int rows, int h, int num_sms) {
    const int64_t tiles = (int64_t{rows} / product::kTile + 3) * ((h + product::kTile - 1) / product::kTile);
    return static_cast<uint32_t>(
        std::min<int64_t>(tiles, int64_t{processors(num_sms)} * product::kBlocksPerProcessor));
}

}  // namespace

void launch_embed(const EmbedParams& p, Stream stream) {
    const Arguments check("embed");
    check_grid(check, p.grid);
    check.require(p.m >= 0, "m", "at least 0", p.m);
    check.require(p.h >= 4 && p.h % 4 == 0, "h", "a multiple of 4, at least 4", p.h);
    check.require(p.ldx >= p.h && p.ldx % 4 == 0, "ldx", "a multiple of 4, at least h", p.ldx);
    check.require(p.audio_rows >= 0, "audio_rows", "at least 0", p.audio_rows);
    check.require(p.audio_channels >= 8 && p.audio_channels % 8 == 0, "audio_channels",
                  "a multiple of 8, at least 8", p.audio_channels);
    check.require(p.text_rows >= 0, "text_rows", "at least 0", p.text_rows);
    check.require_pointer(p.video, "video", 8);
    // A tensor without rows has no address.
    if (p.audio_rows > 0) check.require_pointer(p.audio, "audio", 16);
    if (p.text_rows > 0) check.require_pointer(p.text, "text", 16);
    check.require_pointer(p.video_weight, "video_weight", 16);
    check.require_pointer(p.video_bias, "video_bias", 16);
    check.require_pointer(p.audio_weight, "audio_weight", 16);
    check.require_pointer(p.audio_bias, "audio_bias", 16);
    check.require_pointer(p.x, "x", 16);
    check.require_pointer(p.modality_offsets, "modality_offsets", 4);
    if (p.m == 0) return;
    const LaunchConfig config{"embed_sm90",          dim3(blocks_for(p.m, p.h, p.num_sms)),
                              product::kThreads,     1,
                              product::kSharedBytes, stream};
    launch(embed_sm90, config, p);
}

void launch_embed_text(const EmbedTextParams& p, Stream stream) {
    const Arguments check("embed_text");
    check.require(p.rows >= 0, "rows", "at least 0", p.rows);
    check.require(p.channels >= 8 && p.channels % 8 == 0, "channels", "a multiple of 8, at least 8",
                  p.channels);
    check.require(p.h >= 4 && p.h % 4 == 0, "h", "a multiple of 4, at least 4", p.h);
    check.require_pointer(p.text, "text", 16);
    check.require_pointer(p.weight, "weight", 16);
    check.require_pointer(p.bias, "bias", 16);
    check.require_pointer(p.out, "out", 16);
    if (p.rows == 0) return;
    const LaunchConfig config{"embed_text_sm90",     dim3(blocks_for(p.rows, p.h, p.num_sms)),
                              product::kThreads,     1,
                              product::kSharedBytes, stream};
    launch(embed_text_sm90, config, p);
}

}  // namespace magihuman
