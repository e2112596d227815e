// Host side of every matrix product: the rules of the problem, the choice of the tile, the launch.
#pragma once

#include <algorithm>
#include <string>

#include "api.h"
#include "common/arguments.h"
#include "common/modality.h"
#include "gemm/gemm.cuh"
#include "gemm/tile_config.h"
#include "hopper/launch.h"

namespace magihuman::gemm {

using WideTile = TileConfig<256, 2, 4>;
using SquareTile = TileConfig<128, 1, 6>;

// Rows of a matrix that copies of 16 bytes can follow.
inline void require_matrix(const Arguments& check, const void* base, const char* name, int64_t pitch,
                           const char* pitch_name, int64_t columns, int64_t multiple) {
    check.require_pointer(base, name, 16);
    const std::string expected =
        "a multiple of " + std::to_string(multiple) + ", at least " + std::to_string(columns);
    check.require(pitch >= columns && pitch % multiple == 0, pitch_name, expected.c_str(), pitch);
}

inline void check_problem(const Arguments& check, const GemmParams& g) {
    // Row numbers are 32-bit, also beyond the last tile.
    constexpr int kMost = 1 << 30;
    check.require(g.m >= 1 && g.m < kMost, "m", "1 to 2^30", g.m);
    check.require(g.k >= 1 && g.k < kMost, "k", "1 to 2^30", g.k);
    check.require(g.groups == 1 || g.groups == kMaxGroups, "groups", "1 or 3", g.groups);
    check.require(g.n >= 1 && g.n < kMost / kMaxGroups, "n", "1 to 2^30 / 3", g.n);
    check.require(g.groups == 1 || g.modality_offsets != nullptr, "modality_offsets", "offsets for 3 groups",
                  0);
    check.require(g.num_sms >= 0, "num_sms", "0 or more", g.num_sms);
    require_matrix(check, g.a, "a", g.lda, "lda", g.k, 8);
    require_matrix(check, g.w, "w", g.ldw, "ldw", g.k, 8);
}

template <typename Config, typename Epilogue>
void launch_tile(const GemmParams& g, int columns, const Epilogue& epilogue, const char* name, int num_sms,
                 Stream stream) {
    const auto map = [&](const void* base, int64_t rows, int64_t pitch, uint32_t box_rows, const char* what) {
        const TensorMapSpec spec = matrix_map_spec(base, ElementType::kBf16, rows, g.k, pitch * sizeof(bf16),
                                                   box_rows, Config::kBlockK, Swizzle::kBytes128);
        return make_tensor_map(spec, what);
    };
    const int rest = columns % Config::kBlockN;
    const bool narrow = rest > 0 && rest <= Epilogue::kNarrowColumns;
    const TileList tiles{
        g.modality_offsets, g.m, g.groups, columns / Config::kBlockN + (rest > 0 && !narrow), narrow,
        Config::kBlockN};
    const KernelParams<Epilogue> params{map(g.a, g.m, g.lda, 64, "a"),
                                        map(g.w, int64_t{g.groups} * g.n, g.ldw, Config::kBlockN / 2, "w"),
                                        tiles,
                                        g.n,
                                        (g.k + Config::kBlockK - 1) / Config::kBlockK,
                                        epilogue};
    // Ranges that end inside a tile add at most one row of tiles each.
    const int64_t tiles_m = (g.m + kBlockM - 1) / kBlockM + g.groups - 1;
    const int64_t most_units = tiles_m * (tiles.n_tiles + kBlockM / kNarrowM * tiles.narrow);
    const auto units = std::min<int64_t>(num_sms / Config::kCluster, most_units);
    launch(gemm_sm90<Config, Epilogue>,
           {name, dim3(static_cast<uint32_t>(units) * Config::kCluster), Config::kThreads, Config::kCluster,
            Config::kSharedBytes, reinterpret_cast<cudaStream_t>(stream)},
           params);
}

// `columns`: how far along N tiles are needed; more than n where an epilogue pads its output.
template <typename Epilogue>
void launch_product(const GemmParams& g, int columns, const Epilogue& epilogue, const char* name,
                    Stream stream) {
    const int num_sms = static_cast<int>(processors(g.num_sms));
    // Narrow tiles fill gaps: they are no round of their own.
    const int narrow = columns % 128 <= Epilogue::kNarrowColumns ? columns % 128 : 0;
    const auto verdicts = choose_gemm_tile({g.m, columns - narrow, g.k, g.groups, num_sms});
    if (verdicts[0].chosen) {
        launch_tile<WideTile>(g, columns, epilogue, name, num_sms, stream);
    } else {
        launch_tile<SquareTile>(g, columns, epilogue, name, num_sms, stream);
    }
}

}  // namespace magihuman::gemm
