// What the launcher of gated attention is made of; tests launch single tiles through it.
#pragma once

#include <algorithm>

#include "api.h"
#include "attention/gated_attention.cuh"
#include "attention/tile_config.h"
#include "common/arguments.h"
#include "hopper/launch.h"

namespace magihuman::attention {

// In the order of kAttentionTiles.
using PairedTile = TileConfig<176, 4, 2>;
using WideTile = TileConfig<176, 4, 1>;
using SquareTile = TileConfig<128, 6, 1>;

inline void check_problem(const GatedAttentionParams& p) {
    const Arguments check("gated_attention");
    // Row numbers are 32-bit, also a tile before the first row or beyond the last.
    constexpr int kMost = 1 << 30;
    check.require(p.m >= 1 && p.m < kMost, "m", "1 to 2^30", p.m);
    check.require(p.num_kv_heads >= 1 && p.num_kv_heads < 1 << 16, "num_kv_heads", "1 to 65535",
                  p.num_kv_heads);
    check.require(p.num_q_heads >= 1 && p.num_q_heads < 1 << 16 && p.num_q_heads % p.num_kv_heads == 0,
                  "num_q_heads", "a multiple of num_kv_heads up to 65535", p.num_q_heads);
    check.require(p.tokens_per_frame >= 0 && p.tokens_per_frame < kMost, "tokens_per_frame", "0 to 2^30",
                  p.tokens_per_frame);
    check.require(p.frame_window >= 0 && p.frame_window <= 1 << 20, "frame_window", "0 to 2^20",
                  p.frame_window);
    check.require((p.tokens_per_frame == 0 && p.text_queries) || p.modality_offsets != nullptr,
                  "modality_offsets", "offsets where rows differ by modality", 0);
    check.require(p.num_sms >= 0, "num_sms", "0 or more", p.num_sms);
    check.require(p.tile >= -1 && p.tile < kCompiledAttentionTiles, "tile",
                  "-1 or the number of a compiled one", p.tile);
    check.require_pointer(p.q, "q", 16);
    check.require_pointer(p.k, "k", 16);
    check.require_pointer(p.v, "v", 16);
    check.require_pointer(p.gate, "gate", 4);
    check.require_pointer(p.out, "out", 16);
}

// How many rows there are, and whose, is known on the device only: the capacity stands for them.
// The number of the tile in kAttentionTiles.
inline int chosen_tile(const GatedAttentionParams& p) {
    if (p.tile >= 0) return p.tile;
    const int64_t window = (2 * int64_t{p.frame_window} + 1) * p.tokens_per_frame;
    const int64_t keys = p.tokens_per_frame == 0 ? p.m : std::min<int64_t>(window, p.m);
    const auto verdicts =
        choose_attention_tile({p.m, p.num_q_heads, keys, static_cast<int>(processors(p.num_sms))});
    const auto chosen =
        std::find_if(verdicts.begin(), verdicts.end(), [](const auto& v) { return v.chosen; });
    return static_cast<int>(chosen - verdicts.begin());
}

template <typename Config>
void run_with_tile(const GatedAttentionParams& p, Stream stream) {
    // [rows, heads, 128] in boxes of half a head of one head.
    const auto map = [&](const void* base, int heads, uint32_t box_rows, const char* name) {
        const uint64_t head = kHead * sizeof(bf16), row = heads * head;
        return make_tensor_map({base,
                                ElementType::kBf16,
                                3,
                                {kHead, static_cast<uint64_t>(heads), static_cast<uint64_t>(p.m)},
                                {head, row},
                                {kHead / 2, 1, box_rows},
                                Swizzle::kBytes128},
                               name);
    };
    const KernelParams params{map(p.q, p.num_q_heads, 64, "q"),
                              map(p.k, p.num_kv_heads, Config::kBlockN, "k"),
                              map(p.v, p.num_kv_heads, Config::kBlockN, "v"),
                              p.gate,
                              static_cast<bf16*>(p.out),
                              p.modality_offsets,
                              p.m,
                              p.num_q_heads,
                              p.num_kv_heads,
                              p.tokens_per_frame,
                              p.frame_window,
                              p.text_queries};
    // Video rows that end inside a tile add at most one tile.
    const int64_t most_units = (int64_t{p.m} + 2 * kBlockM - 1) / kBlockM * p.num_q_heads;
    const auto num_sms = static_cast<int64_t>(processors(p.num_sms));
    Arguments("gated_attention")
        .require(num_sms >= Config::kCluster, "num_sms", "at least 2 for pairs", num_sms);
    const auto clusters = std::min<int64_t>(num_sms / Config::kCluster, most_units);
    launch(gated_attention_sm90<Config>,
           {"gated_attention", dim3(static_cast<uint32_t>(clusters) * Config::kCluster), Config::kThreads,
            Config::kCluster, Config::kSharedBytes, reinterpret_cast<cudaStream_t>(stream)},
           params);
}

}  // namespace magihuman::attention
