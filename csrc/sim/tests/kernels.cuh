// Small kernels that use every instruction wrapper: run by the simulator's tests, and compiled by nvcc to
// look at the machine code. `Bug` plants one mistake each in the first of them.
#pragma once

#include "hopper/memory.h"
#include "hopper/numeric.h"
#include "hopper/sync.h"
#include "hopper/tma.h"
#include "hopper/warp.h"
#include "hopper/wgmma.h"

namespace magihuman::samples {

enum class Bug {
    kNone,
    kNoFullWait,    // consumer reads a stage without waiting for it
    kWrongPhase,    // consumer starts with the producer's parity
    kTooFewBytes,   // announces less than it copies
    kTooManyBytes,  // announces more
    kEarlyRelease,  // frees a stage while its product runs
    kNoRelease,     // never frees one
    kNoWgmmaFence,
    kTouchedAccumulator,  // writes an accumulator in flight
    kNoFinalWait,         // reads accumulators of the last product too early
    kNoProxyFence,        // stores a tile that ordinary writes may not have reached
    kNoStoreWait,         // overwrites the output tile while its store reads
    kExitDuringStore,     // ends while a store reads
    kMisalignedDescriptor,
    kNoInitFence,
    kNoInitSync,         // uses barriers that another thread may not have initialised
    kWrongBarrierCount,  // a named barrier with differing counts
    kOutOfBounds,        // a tile beyond the end of shared memory
    kDivergentWgmma,     // one thread issues another product than its warpgroup
};

struct GemmSampleParams {
    TensorMap a, b, d;
    int tiles_m, tiles_n, k_blocks;
};

// D[M, N] = A[M, K] B[N, K]^T in bf16: one producer warp, two consumer warpgroups of 64 x 128, a ring of
// stages, output through shared memory and TMA stores. Grid: any number of blocks; each takes every
// gridDim.x-th tile.
//
// Shared memory: stages of A [128][64] and B [128][64]; two consumers' D [2][64][64]; barriers.
struct GemmSample {
    static constexpr int kStages = 4, kThreads = 384;
    static constexpr uint32_t kTileBytes = 128 * 64 * 2, kStageBytes = 2 * kTileBytes,
                              kBoxBytes = 64 * 64 * 2;
    static constexpr uint32_t kOutput = kStages * kStageBytes, kBarriers = kOutput + 4 * kBoxBytes;
    static constexpr uint32_t kSharedBytes = kBarriers + 2 * kStages * sizeof(Barrier);
};

template <Bug kBug>
__global__ void __launch_bounds__(GemmSample::kThreads, 1)
    gemm_sample(const __grid_constant__ GemmSampleParams p) {
    using S = GemmSample;
    uint8_t* shared = dynamic_shared_memory();
    auto* full_barrier = reinterpret_cast<Barrier*>(shared + S::kBarriers);
    Barrier* empty_barrier = full_barrier + S::kStages;
    const uint32_t warpgroup = warp_id() / 4;
    const int tiles = p.tiles_m * p.tiles_n;

    if (warp_id() == 0 && elect_one()) {
        role("setup");
        tma_prefetch_map(&p.a);
        for (int i = 0; i < S::kStages; ++i) {
            mbarrier_init(&full_barrier[i], 1, "full_barrier", i);
            mbarrier_init(&empty_barrier[i], 2, "empty_barrier", i);
        }
        if (kBug != Bug::kNoInitFence) fence_mbarrier_init();
    }
    if (kBug != Bug::kNoInitSync) block_sync();

    if (warpgroup == 0) {
        role("producer");
        registers_release<40>();
        if (warp_id() == 0 && elect_one()) {
            int stage = 0;
            uint32_t phase = 1;
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const int row = tile / p.tiles_n * 128, column = tile % p.tiles_n * 128;
                for (int k = 0; k < p.k_blocks; ++k) {
                    mbarrier_wait(&empty_barrier[stage], phase);
                    const int change = kBug == Bug::kTooFewBytes    ? -128
                                       : kBug == Bug::kTooManyBytes ? 128
                                                                    : 0;
                    mbarrier_arrive_expect_tx(&full_barrier[stage], S::kStageBytes + change);
                    uint8_t* to = shared + stage * S::kStageBytes;
                    if (kBug == Bug::kOutOfBounds && k == 1) to = shared + S::kBarriers / 1024 * 1024;
                    tma_load(to, &p.a, &full_barrier[stage], CacheHint::kNormal, k * 64, row);
                    tma_load(shared + stage * S::kStageBytes + S::kTileBytes, &p.b, &full_barrier[stage],
                             CacheHint::kEvictLast, k * 64, column);
                    stage = (stage + 1) % S::kStages;
                    phase ^= stage == 0;
                }
            }
        }
        return;
    }

    role("consumer");
    registers_claim<232>();
    const uint32_t consumer = warpgroup - 1, thread = threadIdx.x % 128, lane = lane_id();
    uint8_t* output = shared + S::kOutput + consumer * 2 * S::kBoxBytes;
    constexpr bool kReleases = kBug != Bug::kNoRelease && kBug != Bug::kEarlyRelease;
    float accumulators[64];
    int stage = 0;
    uint32_t phase = kBug == Bug::kWrongPhase ? 1 : 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int row = tile / p.tiles_n * 128 + consumer * 64, column = tile % p.tiles_n * 128;
        for (int k = 0; k < p.k_blocks; ++k) {
            if (kBug != Bug::kNoFullWait) mbarrier_wait(&full_barrier[stage], phase);
            const uint8_t* a_tile = shared + stage * S::kStageBytes + consumer * 64 * 128;
            if (kBug == Bug::kMisalignedDescriptor) a_tile += 128;
            const uint64_t a = k_major_descriptor<Swizzle::kBytes128>(a_tile);
            uint64_t b =
                k_major_descriptor<Swizzle::kBytes128>(shared + stage * S::kStageBytes + S::kTileBytes);
            if (kBug == Bug::kDivergentWgmma && thread == 77) b = advance(b, 32);
            if (kBug != Bug::kNoWgmmaFence) wgmma_fence();
            for (int step = 0; step < 4; ++step) {
                wgmma_bf16<128>(accumulators, advance(a, step * 32), advance(b, step * 32), k + step > 0);
            }
            wgmma_commit();
            if (kBug == Bug::kTouchedAccumulator) accumulators[7] += 1;
            if (kBug == Bug::kEarlyRelease && thread == 0) mbarrier_arrive(&empty_barrier[stage]);
            // One product stays in flight: the stage before this one is free once its product is done.
            wgmma_wait<1>();
            if (kReleases && k > 0 && thread == 0)
                mbarrier_arrive(&empty_barrier[(stage + S::kStages - 1) % S::kStages]);
            stage = (stage + 1) % S::kStages;
            phase ^= stage == 0;
        }
        if (kBug != Bug::kNoFinalWait) wgmma_wait<0>();
        if (kReleases && thread == 0) {
            mbarrier_arrive(&empty_barrier[(stage + S::kStages - 1) % S::kStages]);
        }

        if (kBug != Bug::kNoStoreWait && thread == 0) tma_store_wait_read<0>();
        named_barrier_sync(1 + consumer, kBug == Bug::kWrongBarrierCount && thread >= 96 ? 96 : 128);
        // Two 8x8 blocks down, two across per stmatrix: this warp's 16 rows and 16 columns at a time.
        for (int j = 0; j < 8; ++j) {
            const uint32_t r = 16 * (thread / 32) + lane % 16, c = 16 * j + lane / 16 * 8;
            const uint32_t offset = swizzle_offset(r * 128 + c % 64 * 2, Swizzle::kBytes128);
            const float* v = accumulators + 8 * j;
            stmatrix_x4(output + c / 64 * S::kBoxBytes + offset, pack_bf16x2(v[0], v[1]),
                        pack_bf16x2(v[2], v[3]), pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7]));
        }
        if (kBug != Bug::kNoProxyFence) fence_proxy_async();
        named_barrier_sync(1 + consumer, 128);
        if (thread == 0) {
            tma_store(&p.d, output, column, row);
            tma_store(&p.d, output + S::kBoxBytes, column + 64, row);
            tma_store_commit();
        }
    }
    if (kBug != Bug::kExitDuringStore && thread == 0) tma_store_wait<0>();
}

struct WgmmaSampleParams {
    TensorMap a, b;
    const uint8_t* a_rows;  // row-major A, for the register form
    float* d;               // [64, N]
};

// D[64, N] = A B with 128 bytes of K, for every operand form. K-major operands are [rows, K] in global
// memory, MN-major ones [K, rows].
// `kTouchedA`: a mistake, a register of A changes in flight.
template <int kN, Major kA, Major kB, Swizzle kSwizzle, bool kARegisters, bool kTouchedA = false>
__global__ void __launch_bounds__(128, 1) wgmma_sample(const __grid_constant__ WgmmaSampleParams p) {
    constexpr uint32_t kSpan = swizzle_span(kSwizzle), kK = 64, kBTile = 64 * 128;
    uint8_t* shared = dynamic_shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(shared + kBTile + kN * 128);
    role("wgmma");
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1, "loaded");
        fence_mbarrier_init();
    }
    block_sync();
    const auto load = [&](const TensorMap& map, uint8_t* tile, Major major, uint32_t rows) {
        // One box per span: of K, all rows; or of rows, all of K.
        const uint32_t length = major == Major::kK ? kK : rows, lines = major == Major::kK ? rows : kK;
        for (uint32_t box = 0; box * kSpan < length * sizeof(bf16); ++box) {
            tma_load(tile + box * lines * kSpan, &map, barrier, CacheHint::kNormal,
                     box * kSpan / sizeof(bf16), 0);
        }
    };
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, ((kARegisters ? 0 : 64) + kN) * 128);
        if (!kARegisters) load(p.a, shared, kA, 64);
        load(p.b, shared + kBTile, kB, kN);
    }
    mbarrier_wait(barrier, 0);

    const auto descriptor = [&](const uint8_t* tile, Major major, uint32_t rows, uint32_t step) {
        if constexpr (kSwizzle == Swizzle::kNone) {
            if (major == Major::kK)
                return matrix_descriptor(tile + 2 * step * rows * 16, rows * 16, 128, kSwizzle);
            return matrix_descriptor(tile + step * 16 * 16, 128, kK * 16, kSwizzle);
        } else {
            const uint32_t byte = step * 32;
            if (major == Major::kK) {
                return k_major_descriptor<kSwizzle>(tile + byte / kSpan * rows * kSpan + byte % kSpan);
            }
            return mn_major_descriptor<kSwizzle>(tile + step * 16 * kSpan, kK * kSpan);
        }
    };
    float d[kN / 2];
    const uint32_t row = 16 * (threadIdx.x / 32) + lane_id() / 4;
    uint32_t a_registers[4][4];
    for (int i = 0; kARegisters && i < 16; ++i) {
        const uint32_t byte = i / 4 * 32 + lane_id() % 4 * 4 + i % 4 / 2 * 16;
        const uint8_t* at = p.a_rows + (row + i % 2 * 8) * 128 + byte;
        a_registers[i / 4][i % 4] = load_global(reinterpret_cast<const uint32_t*>(at));
    }
    wgmma_fence();
#pragma unroll
    for (uint32_t step = 0; step < 4; ++step) {
        const uint64_t b = descriptor(shared + kBTile, kB, kN, step);
        if constexpr (kARegisters) {
            wgmma_bf16<kN, kB>(d, a_registers[step], b, step > 0);
        } else {
            wgmma_bf16<kN, kA, kB>(d, descriptor(shared, kA, 64, step), b, step > 0);
        }
    }
    wgmma_commit();
    if (kTouchedA && threadIdx.x == 77) a_registers[2][1] ^= 1;
    wgmma_wait<0>();
    for (int j = 0; j < kN / 8; ++j) {
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = (row + 8 * half) * kN + 8 * j + lane_id() % 4 * 2;
            store_global(reinterpret_cast<float2*>(p.d + at),
                         make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]));
        }
    }
}

struct CopySampleParams {
    TensorMap from, to;
    uint32_t bytes;
    int source[5], target[5];
};

// Loads one box and stores it elsewhere.
template <int kRank>
__global__ void copy_sample(const __grid_constant__ CopySampleParams p) {
    uint8_t* shared = dynamic_shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(shared + p.bytes);
    role("copy");
    if (threadIdx.x != 0) return;
    mbarrier_init(barrier, 1, "loaded");
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, p.bytes);
    const int *s = p.source, *t = p.target;
    if constexpr (kRank == 2) tma_load(shared, &p.from, barrier, CacheHint::kEvictFirst, s[0], s[1]);
    if constexpr (kRank == 3) tma_load(shared, &p.from, barrier, CacheHint::kEvictFirst, s[0], s[1], s[2]);
    if constexpr (kRank == 4)
        tma_load(shared, &p.from, barrier, CacheHint::kEvictFirst, s[0], s[1], s[2], s[3]);
    if constexpr (kRank == 5)
        tma_load(shared, &p.from, barrier, CacheHint::kEvictFirst, s[0], s[1], s[2], s[3], s[4]);
    mbarrier_wait(barrier, 0);
    if constexpr (kRank == 2) tma_store(&p.to, shared, t[0], t[1]);
    if constexpr (kRank == 3) tma_store(&p.to, shared, t[0], t[1], t[2]);
    if constexpr (kRank == 4) tma_store(&p.to, shared, t[0], t[1], t[2], t[3]);
    if constexpr (kRank == 5) tma_store(&p.to, shared, t[0], t[1], t[2], t[3], t[4]);
    tma_store_commit();
    tma_store_wait<0>();
}

// Mistakes in the next two.
enum class ClusterBug {
    kNone,
    kNoRelease,    // a block overwrites its peers' memory without hearing that they are done
    kNoInitFence,  // nothing publishes the barriers
    kNoDrain,      // a block ends while its peers may still arrive at its barriers
};

// Every thread of a block arrives at a barrier that one of them has initialised, after a barrier of the cluster or of
// the block.
template <ClusterBug kBug, bool kCluster>
__global__ void cluster_start_sample() {
    auto* barrier = reinterpret_cast<Barrier*>(dynamic_shared_memory());
    role("start");
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, blockDim.x, "all_barrier");
        if (kBug != ClusterBug::kNoInitFence) fence_mbarrier_init();
    }
    if (kCluster) {
        cluster_sync_relaxed();
    } else {
        block_sync();
    }
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
}

struct MulticastSampleParams {
    TensorMap from;  // [rounds * 16 * blocks, 64] bf16
    uint16_t* to;    // [blocks, rounds, 16 * blocks, 64]
    int rounds;
};

// Each block of the cluster loads its 16 rows of every round for all blocks; each block writes all it
// received.
template <ClusterBug kBug>
__global__ void multicast_sample(const __grid_constant__ MulticastSampleParams p) {
    uint8_t* shared = dynamic_shared_memory();
    const uint32_t blocks = cluster_size(), rank = cluster_rank(), bytes = blocks * 16 * 128;
    auto* full_barrier = reinterpret_cast<Barrier*>(shared + bytes);
    Barrier* empty_barrier = full_barrier + 1;
    role("setup");
    if (threadIdx.x == 0) {
        mbarrier_init(full_barrier, 1, "full_barrier");
        mbarrier_init(empty_barrier, blocks, "empty_barrier");
        if (kBug != ClusterBug::kNoInitFence) fence_mbarrier_init();
    }
    cluster_sync_relaxed();
    role("multicast");
    for (int round = 0; round < p.rounds; ++round) {
        if (threadIdx.x == 0) {
            if (kBug != ClusterBug::kNoRelease) mbarrier_wait(empty_barrier, (round & 1) ^ 1);
            mbarrier_arrive_expect_tx(full_barrier, bytes);
            tma_load_multicast(shared + rank * 16 * 128, &p.from, full_barrier,
                               static_cast<uint16_t>((1 << blocks) - 1), CacheHint::kNormal, 0,
                               static_cast<int>((round * blocks + rank) * 16));
        }
        mbarrier_wait(full_barrier, round & 1);
        uint16_t* to = p.to + (blockIdx.x * p.rounds + round) * bytes / 2;
        for (uint32_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
            store_global(reinterpret_cast<uint4*>(to) + i, load_shared<uint4>(shared + i * 16));
        }
        block_sync();
        if (threadIdx.x < blocks) mbarrier_arrive_cluster(empty_barrier, threadIdx.x);
    }
    if (kBug != ClusterBug::kNoDrain && threadIdx.x == 0) mbarrier_wait(empty_barrier, (p.rounds & 1) ^ 1);
}

// One warp: a 16x16 matrix of 16-bit numbers through ldmatrix and stmatrix, both ways, and the row sums of
// the lanes' numbers through shuffles. out: [16, 16] plain, [16, 16] transposed, then 32 sums.
template <int kLanes = 32>
__global__ void warp_sample(const uint16_t* in, uint16_t* out, float* sums, uint32_t* votes) {
    uint8_t* shared = dynamic_shared_memory();
    role("warp");
    const uint32_t lane = lane_id();
    for (uint32_t i = lane; i < 32; i += kLanes) {
        store_shared(shared + i * 16, load_global_constant(reinterpret_cast<const uint4*>(in) + i));
    }
    warp_sync();
    uint32_t m[4];
    uint8_t* row = shared + (lane % 16) * 32 + lane / 16 * 16;
    ldmatrix_x4(row, m);
    stmatrix_x4(row + 512, m[0], m[1], m[2], m[3]);
    ldmatrix_x4<true>(row, m);
    // Transposed blocks; the two off-diagonal blocks change places.
    stmatrix_x4(row + 1024, m[0], m[2], m[1], m[3]);
    stmatrix_x4<true>(row + 1536, m[0], m[1], m[2], m[3]);
    warp_sync();
    for (uint32_t i = lane; i < 96; i += kLanes) {
        store_global_streaming(reinterpret_cast<uint4*>(out) + i, load_shared<uint4>(shared + 512 + i * 16));
    }
    float sum = static_cast<float>(lane * lane);
    for (uint32_t mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    store_global(sums + lane, sum + shuffle(static_cast<float>(lane), 5));
    const uint32_t odd = ballot(lane % 2 == 1);
    if (lane == 0) atomic_add_global(votes, odd);
}

}  // namespace magihuman::samples
