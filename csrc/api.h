// The whole surface of the kernel library: one plain struct and one launcher per operation. No CUDA, torch or
// Python header is needed to use it.
//
// Pointers are device memory. M counts the rows a buffer has room for; the rows in use come from device memory:
// modality_offsets is int32[4], (0, Nv, Nv + Na, L), the ranges of video, audio and text rows. Rows at or
// beyond L are never written. With groups = 3 a row uses the expert (or norm weight) of its range, with
// groups = 1 all rows share one. Pitches (lda, ..) are in elements. Pointers to 16-bit floats are void.
//
// Launchers throw std::invalid_argument, naming what was wrong, before anything is launched, and
// std::runtime_error on a CUDA error. They allocate nothing, wait for nothing and keep no state: each can be
// captured in a graph. num_sms is the size of persistent grids in multiprocessors; 0: ask the device.
#pragma once

#include <cstdint>

struct CUstream_st;

#define MAGIHUMAN_API __attribute__((visibility("default")))

namespace magihuman {

using Stream = CUstream_st*;

// --- versions ---------------------------------------------------------------------------------------------

// As CUDA numbers them: 12040 is 12.4. Asked without a context.
struct CudaVersions {
    int runtime;  // that the library was built with
    int driver;   // the newest that the driver supports; 0: there is no driver
};
MAGIHUMAN_API CudaVersions cuda_versions();

// --- matrix products: d = a wT in bf16 with float32 accumulation ------------------------------------------
// The product is rounded to bf16 first; what follows it happens in float32 and is rounded to bf16 once more.

struct GemmParams {
    const void* a;  // bf16 [M, K]
    int64_t lda;
    const void* w;  // bf16 [groups * N, K]; ldw >= K, a multiple of 8
    int64_t ldw;
    int m, n, k, groups;
    const int* modality_offsets;  // may be null with groups = 1: all M rows
    int num_sms;
};

// d = bf16(a wT)
struct GemmBf16Params {
    GemmParams g;
    void* d;  // bf16 [M, N]
    int64_t ldd;
};
MAGIHUMAN_API void launch_gemm(const GemmBf16Params& params, Stream stream);

// x += bf16(a wT)
struct GemmResidualParams {
    GemmParams g;
    float* x;  // [M, N]
    int64_t ldx;
};
MAGIHUMAN_API void launch_gemm_residual(const GemmResidualParams& params, Stream stream);

// d = bf16(u sigmoid(1.702 u)), u = min(bf16(a wT), 7)
struct GemmGelu7Params {
    GemmParams g;
    void* d;  // bf16 [M, N]
    int64_t ldd;
};
MAGIHUMAN_API void launch_gemm_gelu7(const GemmGelu7Params& params, Stream stream);

// Even rows of w give the gate, odd ones the linear part: N = 2 width.
// d = bf16(g sigmoid(1.702 g) (l + 1)), g = min(gate, 7), l = clamp(linear, -7, 7)
struct GemmSwiglu7Params {
    GemmParams g;
    void* d;  // bf16 [M, d_cols], columns width .. d_cols zero
    int64_t ldd;
    int d_cols;
};
MAGIHUMAN_API void launch_gemm_swiglu7(const GemmSwiglu7Params& params, Stream stream);

// N = 128 (num_q_heads + 2 num_kv_heads) + num_q_heads: query, key, value, gate.
// q, k = bf16(rotate(rms_norm(per head))), v = bf16, gate = float32 logits (bf16 values)
struct GemmQkvParams {
    GemmParams g;
    int num_q_heads, num_kv_heads;
    const float* q_norm;  // [groups, 128], offset from 1
    const float* k_norm;
    const float* rope;  // [M, 96]: 48 sines, 48 cosines
    void* q;            // bf16 [M, heads, 128] contiguous
    void* k;
    void* v;
    float* gate;  // [M, num_q_heads]
};
MAGIHUMAN_API void launch_gemm_qkv(const GemmQkvParams& params, Stream stream);

// --- attention --------------------------------------------------------------------------------------------

// out = bf16(sigmoid(gate) softmax(q kT / sqrt(128)) v), query head h with key/value head h / (query heads per
// key/value head). With tokens_per_frame video rows see the video rows of frames at most frame_window away and all audio
// and text rows, which see everything; else every row sees every row.
struct GatedAttentionParams {
    const void* q;      // bf16 [M, num_q_heads, 128]
    const void* k;      // bf16 [M, num_kv_heads, 128]
    const void* v;      // bf16 [M, num_kv_heads, 128]
    const float* gate;  // [M, num_q_heads], logits
    void* out;          // bf16 [M, num_q_heads, 128]
    int m, num_q_heads, num_kv_heads;
    const int* modality_offsets;  // may be null without window and with text queries: all M rows
    int tokens_per_frame;         // video rows of one latent frame; 0: no window
    int frame_window;
    bool text_queries;  // false: text rows of out are left alone
    int num_sms;
    int tile = -1;  // for measurements: the number of a compiled one (attention/tile_config.h); -1: the best
};
MAGIHUMAN_API void launch_gated_attention(const GatedAttentionParams& params, Stream stream);

// --- pointwise operations ---------------------------------------------------------------------------------

// out = bf16(x rsqrt(mean(x^2) + eps) (1 + weight))
struct RmsNormParams {
    const float* x;  // [M, H]
    int64_t ldx;
    const float* weight;  // [groups, H], offset from 1
    void* out;            // bf16 [M, H]
    int64_t ldout;
    int m, h, groups;  // h: a multiple of 8, at most 5120
    const int* modality_offsets;
    float eps;
    int num_sms;
};
MAGIHUMAN_API void launch_rms_norm(const RmsNormParams& params, Stream stream);

// How latents [C, T, H, W] are cut into tokens of 2 x 2 latents, ordered t, h, w.
struct LatentGrid {
    int channels, frames, height, width;  // height, width: even
};

// x = patches of video, then audio, each times weightT plus bias in float32; then the text rows, copied.
// Patch channels: (c, ph, pw), c slowest.
struct EmbedParams {
    const float* video;  // [C, T, H, W]
    LatentGrid grid;
    const float* audio;  // [audio_rows, audio_channels]
    int audio_rows, audio_channels;
    const float* text;  // [text_rows, H], as launch_embed_text leaves it
    int text_rows;
    const float* video_weight;  // [H, 4 C]
    const float* video_bias;    // [H]
    const float* audio_weight;  // [H, audio_channels]
    const float* audio_bias;    // [H]
    float* x;                   // [M, H]
    int64_t ldx;
    int m, h;
    const int* modality_offsets;
    int num_sms;
};
MAGIHUMAN_API void launch_embed(const EmbedParams& params, Stream stream);

// out = text weightT + bias in float32: the text rows of x, which are the same in every step.
struct EmbedTextParams {
    const float* text;    // [rows, channels]
    const float* weight;  // [H, channels]
    const float* bias;    // [H]
    float* out;           // [rows, H]
    int rows, channels, h;
    int num_sms;
};
MAGIHUMAN_API void launch_embed_text(const EmbedTextParams& params, Stream stream);

// velocity = rms_norm(x) weightT in float32, video rows unpatched; token channels: (ph, pw, c), c fastest.
struct HeadParams {
    const float* x;  // [M, H]
    int64_t ldx;
    const float* video_norm;  // [H], offset from 1
    const float* audio_norm;
    const float* video_weight;  // [4 C, H]
    const float* audio_weight;  // [audio_channels, H]
    float* video;               // [C, T, H, W]
    LatentGrid grid;
    float* audio;  // [audio_rows, audio_channels]
    int audio_rows, audio_channels;
    int m, h;
    const int* modality_offsets;
    float eps;
    int num_sms;
};
MAGIHUMAN_API void launch_head(const HeadParams& params, Stream stream);

// The sampler's updates read the step's number from device memory and take its row of their tables; a number
// outside 0 .. steps - 1 leaves everything as it is.

// x = renoise noise + keep (x - sigma velocity)
struct RenoiseStepParams {
    float* x;               // [count]
    const float* velocity;  // [count]
    const float* noise;     // [steps, count]
    const float* table;     // [steps, 3]: sigma, keep = 1 - sigma_next, renoise = sigma_next
    const int* step;        // [1]
    int64_t count;          // a multiple of 4
    int steps;
    int num_sms;
};
MAGIHUMAN_API void launch_renoise_step(const RenoiseStepParams& params, Stream stream);

// video[:, 0] = image
struct ClampImageParams {
    float* video;        // [C, T, H, W]
    const float* image;  // [C, H, W]
    LatentGrid grid;
    int num_sms;
};
MAGIHUMAN_API void launch_clamp_image(const ClampImageParams& params, Stream stream);

// v = velocity, or null_velocity + guidance (velocity - null_velocity) where there is a null_velocity
// m = x - sigma v
// x' = own x + last x_last + old m_older + prev m_previous + new m
// x = keep x' + current m + previous m_previous;  x_last = x'
// Terms whose factor is 0 are not read, so that the history may begin uninitialised.
struct UnipcStepParams {
    float* x;                    // [count]
    const float* velocity;       // [count]
    const float* null_velocity;  // [count] or null
    const float* guidance;       // [steps, frames]; used with null_velocity
    float* x_last;               // [count]
    float* history;              // [2, count]: m of this step goes to row step % 2
    const float* table;          // [steps, 9]: sigma, own, last, old, prev, new, keep, current, previous
    const int* step;             // [1]
    int64_t count;               // a multiple of 4
    int64_t frame_size;  // elements that share one guidance, a multiple of 4: frame = i / frame_size % frames
    int frames;
    int steps;
    int num_sms;
};
MAGIHUMAN_API void launch_unipc_step(const UnipcStepParams& params, Stream stream);

// ++*step
struct AdvanceStepParams {
    int* step;
};
MAGIHUMAN_API void launch_advance_step(const AdvanceStepParams& params, Stream stream);

// --- convolutions of the video decoder --------------------------------------------------------------------
// Pixels are bf16 [frames][H][W][C], C a multiple of 8; frame t of a clip lies at t % frames, so that a buffer may
// hold all of a clip or the last few frames. Products in float32. Space is padded with zeros, time with copies of
// the clip's first and last frame. Weights: bf16 [channels][time taps][vertical taps][horizontal taps][in_channels].

struct PixelFrames {
    void* data;
    int frames;
};

// v = bf16(conv(x) + bias), then bf16(v + shortcut) where there is one.
// out = v, or with out_eps > 0 bf16(v / rms(v)), rms(v) = sqrt(mean over channels of v^2 + out_eps)
// normed = bf16(act(bf16(v / rms(v)))), with eps. Norms: at most 256 channels. Both may be null, not together.
struct ConvParams {
    PixelFrames x;
    int height, width, in_channels;
    int length;        // frames of the clip
    int first, count;  // frames to compute
    const void* w;
    const float* bias;  // [channels]
    int channels;
    PixelFrames shortcut, out, normed;
    float out_eps, eps;
    int activation;  // 0 none, 1 SiLU, 2 ReLU
    int num_sms;
};

// 3x3x3 (time_taps 3), or 3x3 of every frame (time_taps 1).
struct Conv3x3Params {
    ConvParams c;
    int time_taps;
};
MAGIHUMAN_API void launch_conv_3x3(const Conv3x3Params& params, Stream stream);

// 1x1x1
MAGIHUMAN_API void launch_conv_1x1(const ConvParams& params, Stream stream);

// Nearest-neighbour doubling of H and W, then 3x3 of every frame, as four 2x2 convolutions of x:
// w is [4: py, px][channels][2][2][in_channels], outputs are [frames][2 H][2 W][channels].
MAGIHUMAN_API void launch_conv_upsample(const ConvParams& params, Stream stream);

// 3x1x1 to 2 channels, w [2][channels][3][in_channels], bias [2][channels]: the halves become frames 2 t - drop and
// 2 t + 1 - drop of the outputs; frame -1 is not stored.
struct ConvTimeParams {
    ConvParams c;
    int drop;  // 0 or 1
};
MAGIHUMAN_API void launch_conv_time(const ConvTimeParams& params, Stream stream);

// 3x3x3 to 12 channels, which are 2 x 2 pixels: channel rgb 4 + pw 2 + ph. y = bf16(conv(x) + bias).
// frames = uint8(clamp(y / 2 + 1/2, 0, 1) 255), or picture = y: exactly one is given.
struct ConvPictureParams {
    PixelFrames x;
    int height, width, in_channels;
    int length, first, count;
    const void* w;
    const float* bias;
    uint8_t* frames;  // [count][2 H][2 W][3]
    float* picture;   // [3][count][2 H][2 W]
    int num_sms;
};
MAGIHUMAN_API void launch_conv_picture(const ConvPictureParams& params, Stream stream);

// normed = bf16(act(bf16(x / rms(x)))) with eps, and where wanted plain = bf16(x / rms(x)) with plain_eps, for
// frames first .. first + count - 1. x and normed may be the same buffer. At most 512 channels.
struct ChannelNormParams {
    PixelFrames x, normed, plain;
    int height, width, channels;
    int first, count;
    float eps, plain_eps;
    int activation;
    int num_sms;
};
MAGIHUMAN_API void launch_channel_norm(const ChannelNormParams& params, Stream stream);

// pixels [count][H][W][C] = bf16(latent std + mean), from frames first .. of latent; beyond its last frame, that one.
struct LatentPixelsParams {
    const float* latent;  // [C][frames][H][W]
    const float* mean;    // [C]
    const float* std;     // [C]
    void* pixels;
    int channels, frames, height, width;
    int first, count;
    int num_sms;
};
MAGIHUMAN_API void launch_latent_pixels(const LatentPixelsParams& params, Stream stream);

}  // namespace magihuman
