// The matrix product of the model, d[M, N] = epilogue(a[M, K] w[N, K]^T), with one weight for all rows or one
// for each modality's range of rows.
//
// Persistent blocks of three warpgroups:
//   producer   one thread copies the stages of its block's tiles, running ahead into the next tile while the
//              consumers store this one
//   consumer   two warpgroups, 64 rows each: products, then the epilogue from their registers
// All of them walk the same list of tiles (scheduler.cuh).
//
// Shared memory: kNumStages of A [2][64][128 B] and B [2][BLOCK_N / 2][128 B], 128-byte swizzle; 4 KB of
// output staging per consumer warp; the ring's barriers.
#pragma once

#include "gemm/epilogue_store.cuh"
#include "gemm/mainloop.cuh"

namespace magihuman::gemm {

template <typename Epilogue>
struct KernelParams {
    TensorMap a, w;
    TileList tiles;
    int n, k_blocks;  // weight rows per expert, stages per tile
    Epilogue epilogue;
};

// `next` finds the tile after this one: divisions, which run beside the first products.
template <typename Config, typename Epilogue, int kN, typename Next>
HOPPER_INLINE void compute_tile(const KernelParams<Epilogue>& p, Ring<Config>& ring, WarpTile warp,
                                int consumer, const Next& next) {
    float acc[kN / 2];
    consume<Config, kN>(ring, acc, consumer, p.k_blocks, [&](int k_block) {
        if (k_block == 0) next();
        if constexpr (Epilogue::kPrefetches) {
            constexpr int kCalls = kWarpRows * kN / 32 / 32;
            const int i = k_block - (p.k_blocks - 3 * kCalls);
            if (i >= 0 && i < kCalls) p.epilogue.template prefetch<kN>(warp, i);
        }
    });
    // Else every address of the epilogue would be computed before the loop, and the products would spill.
    warp.lane = opaque(warp.lane);
    p.epilogue.template operator()<kN>(acc, warp);
}

template <typename Config, typename Epilogue>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gemm_sm90(const __grid_constant__ KernelParams<Epilogue> p) {
    constexpr bool kPaired = Config::kCluster > 1;
    uint8_t* shared = dynamic_shared_memory();
    Ring<Config> ring(shared);
    const uint32_t warp = warp_id();
    const int rank = kPaired ? static_cast<int>(cluster_rank()) : 0;

    if (warp == 0 && elect_one()) {
        role("setup");
        tma_prefetch_map(&p.a);
        tma_prefetch_map(&p.w);
        ring.initialise();
    }
    if constexpr (kPaired) cluster_arrive_relaxed();
    // Here, so that the barrier hides the latency of the ranges.
    Scheduler<Config::kCluster> scheduler(p.tiles, load_ranges(p.tiles.modality_offsets, p.tiles.m), rank,
                                          static_cast<int>(blockIdx.x) / Config::kCluster,
                                          static_cast<int>(gridDim.x) / Config::kCluster);
    if constexpr (kPaired) {
        cluster_wait();
    } else {
        block_sync();
    }

    Tile tile;
    if (warp < 4) {
        role("producer");
        registers_release<Config::kProducerRegisters>();
        if (warp == 0 && elect_one()) {
            while (scheduler.next(tile)) produce(ring, &p.a, &p.w, tile, p.n, p.k_blocks, rank);
            if (kPaired && Config::kBug != Bug::kNoDrain) drain(ring);
        }
        warp_sync();
    } else {
        role("consumer");
        registers_claim<Config::kConsumerRegisters>();
        const int consumer = static_cast<int>(warp) / 4 - 1;
        uint8_t* staging = shared + Config::kStaging + (warp - 4) * Config::kWarpStagingBytes;
        bool more = scheduler.next(tile);
        while (more) {
            const Tile current = tile;
            const auto next = [&] { more = scheduler.next(tile); };
            if (current.rows <= consumer * 64) {
                pass(ring, consumer, p.k_blocks);
                next();
                continue;
            }
            const int row = consumer * 64 + static_cast<int>(warp) % 4 * kWarpRows;
            const int rows = Config::kBug == Bug::kStoresBeyondEnd ? kWarpRows : current.rows - row;
            const WarpTile part{current.group, current.row + row, rows, current.column, staging, lane_id()};
            if constexpr (Epilogue::kNarrowColumns > 0) {
                if (current.narrow) {
                    compute_tile<Config, Epilogue, Epilogue::kNarrowColumns>(p, ring, part, consumer, next);
                    continue;
                }
            }
            compute_tile<Config, Epilogue, Config::kBlockN>(p, ring, part, consumer, next);
        }
    }
}

}  // namespace magihuman::gemm
