// The pipeline of every matrix product: a ring of shared-memory stages, filled by one thread through the copy
// engine and emptied by two warpgroups through the tensor cores.
//
// A stage holds 128 bytes of K (64 bf16) of the block's rows and columns:
//   A  two boxes of 64 rows, one per consumer warpgroup; the second is left out where no row of it is needed
//   B  two boxes of BLOCK_N / 2 weight rows
// In a pair of blocks each fetches one box of the operand that both need, for both. So a stage is free only
// once the consumers of both blocks say so, and each block hears from four warpgroups.
#pragma once

#include <type_traits>

#include "gemm/scheduler.cuh"
#include "hopper/numeric.h"
#include "hopper/sync.h"
#include "hopper/tma.h"
#include "hopper/warp.h"
#include "hopper/wgmma.h"

namespace magihuman::gemm {

// Mistakes that tests plant to see the simulator find them.
enum class Bug {
    kNone,
    kNoFullWait,      // consumers do not wait for a stage
    kEarlyRelease,    // they free it while products read it
    kNoPeerRelease,   // they free it in their own block only
    kNoDrain,         // a block ends while its peer may still free its stages
    kStoresBeyondEnd  // rows of the next range are stored as well
};

// A compiled tile. Shared memory: stages, the consumers' output staging, barriers; at most 227 KB.
template <int kTileN, int kBlocks, int kRingStages>
struct TileConfig {
    static constexpr int kBlockN = kTileN, kCluster = kBlocks, kNumStages = kRingStages;
    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
    static constexpr uint32_t kRowBytes = 128;  // of K in a stage: the swizzle span
    static constexpr int kBlockK = kRowBytes / sizeof(bf16);
    static constexpr uint32_t kABoxBytes = 64 * kRowBytes, kBBoxBytes = kTileN / 2 * kRowBytes;
    static constexpr uint32_t kStageBytes = 2 * kABoxBytes + 2 * kBBoxBytes;
    static constexpr uint32_t kWarpStagingBytes = 16 * 128 * 2;  // 16 rows of 128 bf16
    static constexpr uint32_t kStaging = kRingStages * kStageBytes;
    static constexpr uint32_t kBarriers = kStaging + 4 * kConsumers * kWarpStagingBytes;
    static constexpr uint32_t kSharedBytes = kBarriers + 2 * kRingStages * sizeof(Barrier);
    static_assert(kSharedBytes <= 227 * 1024);
    // 128 accumulators a thread and the epilogue's values on one side, addresses on the other.
    static constexpr uint32_t kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
    static constexpr Bug kBug = Bug::kNone;
};

template <typename Config>
class Ring {
  public:
    HOPPER_INLINE explicit Ring(uint8_t* shared)
        : shared_(shared), full_(reinterpret_cast<Barrier*>(shared + Config::kBarriers)) {}

    HOPPER_INLINE void initialise() {
        for (int i = 0; i < Config::kNumStages; ++i) {
            mbarrier_init(full(i), 1, "full_barrier", i);
            mbarrier_init(empty(i), Config::kConsumers * Config::kCluster, "empty_barrier", i);
        }
        fence_mbarrier_init();
    }

    HOPPER_INLINE Barrier* full(int stage) const { return full_ + stage; }
    HOPPER_INLINE Barrier* empty(int stage) const { return full_ + Config::kNumStages + stage; }
    HOPPER_INLINE uint8_t* a_box(int stage, int box) const {
        return shared_ + stage * Config::kStageBytes + box * Config::kABoxBytes;
    }
    HOPPER_INLINE uint8_t* b_box(int stage, int box) const {
        return a_box(stage, 2) + box * Config::kBBoxBytes;
    }

    HOPPER_INLINE void advance() {
        if (++stage == Config::kNumStages) {
            stage = 0;
            phase ^= 1;
        }
    }

    int stage = 0;
    uint32_t phase = 0;

  private:
    uint8_t* shared_;
    Barrier* full_;
};

// One thread: fetches this block's part of every stage of one tile. `n` is the expert's count of weight rows.
template <typename Config>
HOPPER_INLINE void produce(Ring<Config>& ring, const TensorMap* a, const TensorMap* w, const Tile& tile,
                           int n, int k_blocks, int rank) {
    constexpr bool kPaired = Config::kCluster > 1;
    constexpr uint16_t kBoth = 3;
    constexpr int kBoxN = Config::kBlockN / 2;
    const bool rows_shared = kPaired && tile.shared == Shared::kRows;
    const bool weights_shared = kPaired && tile.shared == Shared::kWeights;
    const int a_boxes = (tile.a_rows + 63) / 64;
    // A block that only helps its pair takes no weights of its own; shared ones come all the same.
    const int b_boxes = !weights_shared && tile.rows == 0 ? 0 : tile.narrow ? 1 : 2;
    const uint32_t bytes = a_boxes * Config::kABoxBytes + b_boxes * Config::kBBoxBytes;
    const int weight_row = tile.group * n + tile.column;
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        const int k = k_block * Config::kBlockK, stage = ring.stage;
        Barrier* full = ring.full(stage);
        mbarrier_wait(ring.empty(stage), ring.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
#pragma unroll
        for (int box = 0; box < 2; ++box) {
            if (box < a_boxes) {
                uint8_t* to = ring.a_box(stage, box);
                if (!rows_shared) {
                    tma_load(to, a, full, CacheHint::kNormal, k, tile.row + box * 64);
                } else if (box == rank) {
                    tma_load_multicast(to, a, full, kBoth, CacheHint::kNormal, k, tile.row + box * 64);
                }
            }
            if (box < b_boxes) {
                uint8_t* to = ring.b_box(stage, box);
                if (!weights_shared) {
                    tma_load(to, w, full, CacheHint::kNormal, k, weight_row + box * kBoxN);
                } else if (box == rank) {
                    tma_load_multicast(to, w, full, kBoth, CacheHint::kNormal, k, weight_row + box * kBoxN);
                }
            }
        }
        ring.advance();
    }
}

// The same thread, after its last tile: every stage is free, so no peer will arrive at this block's barriers any more,
// and none has a copy under way to its stages, for those were awaited before they were freed. The block may end.
template <typename Config>
HOPPER_INLINE void drain(Ring<Config>& ring) {
    for (int i = 0; i < Config::kNumStages; ++i) {
        mbarrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
        ring.advance();
    }
}

// This warpgroup is done with a stage: says so in every block that fills a part of it.
template <typename Config>
HOPPER_INLINE void release(const Ring<Config>& ring, int stage) {
    const uint32_t thread = threadIdx.x % 128;
    if constexpr (Config::kCluster == 1 || Config::kBug == Bug::kNoPeerRelease) {
        if (thread == 0) mbarrier_arrive(ring.empty(stage));
    } else {
        if (thread < Config::kCluster) mbarrier_arrive_cluster(ring.empty(stage), thread);
    }
}

// d = this warpgroup's 64 rows times kN columns of one tile. `beside(k_block)` runs beside the products.
template <typename Config, int kN, typename Beside>
HOPPER_INLINE void consume(Ring<Config>& ring, float (&d)[kN / 2], int consumer, int k_blocks,
                           const Beside& beside) {
    const auto products = [&](int k_block, [[maybe_unused]] auto first) {
        const int stage = ring.stage;
        if (Config::kBug != Bug::kNoFullWait) mbarrier_wait(ring.full(stage), ring.phase);
        const uint64_t a = k_major_descriptor<Swizzle::kBytes128>(ring.a_box(stage, consumer));
        const uint64_t b = k_major_descriptor<Swizzle::kBytes128>(ring.b_box(stage, 0));
        wgmma_fence();
#pragma unroll
        for (uint32_t step = 0; step < Config::kRowBytes / 32; ++step) {
            wgmma_bf16<kN>(d, advance(a, step * 32), advance(b, step * 32),
                           !decltype(first)::value || step > 0);
        }
        wgmma_commit();
        beside(k_block);
        if (Config::kBug == Bug::kEarlyRelease) release(ring, stage);
    };
    // The first block of K on its own: that it starts from zero is then known to the compiler, which would
    // otherwise keep the previous tile's accumulators through the epilogue as an input of this one.
    int previous = ring.stage;
    products(0, std::true_type{});
    ring.advance();
    for (int k_block = 1; k_block < k_blocks; ++k_block) {
        const int stage = ring.stage;
        products(k_block, std::false_type{});
        // These products run on while the next stage is awaited; those before them are done.
        wgmma_wait<1>();
        if (Config::kBug != Bug::kEarlyRelease) release(ring, previous);
        previous = stage;
        ring.advance();
    }
    wgmma_wait<0>();
    wgmma_results(d);
    if (Config::kBug != Bug::kEarlyRelease) release(ring, previous);
}

// Lets the stages of a tile pass that has no row for this warpgroup.
template <typename Config>
HOPPER_INLINE void pass(Ring<Config>& ring, int consumer, int k_blocks) {
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        mbarrier_wait(ring.full(ring.stage), ring.phase);
        // Products keep the four warps together; here a warp that lags could miss a whole round of the ring.
        named_barrier_sync(1 + consumer, 128);
        release(ring, ring.stage);
        ring.advance();
    }
}

}  // namespace magihuman::gemm
