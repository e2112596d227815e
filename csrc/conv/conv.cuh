// Convolution as a matrix product: pixels [64 of a unit, taps x channels] times weights [out, taps x channels]T.
//
// With 64 output channels or fewer the roles are swapped: weights [64, ..] times pixels [256 of a unit, ..]T. Products
// of 64 by 64 read 128 bytes of shared memory a clock, all that there is; of 64 by 256 they read 80.
//
// Persistent blocks of three warpgroups:
//   pixels     one thread fetches boxes of 8 x (kUnitRows + kTapsY - 1) pixels x 64 channels, one per unit,
//              horizontal tap and time tap. Pixels beyond the picture read as zero; frames beyond the clip as its ends
//   weights    one thread fetches one tap x 64 channels of BLOCK_N output channels. In a pair of blocks each
//              fetches half of them, for both
//   consumer   two warpgroups, kUnits units each: per box kTapsY products (pixel_tiles.cuh says why no more
//              boxes are needed), then the epilogue from their registers; swapped, 64 pixels at a time change rows and
//              columns in shared memory before it
// All of them walk the same list of tiles, and within one: time taps, horizontal taps, channels, vertical taps.
//
// A box of pixels serves kTapsY products, a box of weights one: hence two rings, where the matrix product of
// gemm/mainloop.cuh needs one.
//
// Shared memory: kPixelStages of [2 kUnits][kUnitRows + kTapsY - 1][8][128 B], kWeightStages of [BLOCK_N][128 B], both
// with 128-byte swizzle; 4 KB of output staging per consumer warp; swapped, 8 KB per warpgroup for the change; the
// rings' barriers.
#pragma once

#include <type_traits>

#include "conv/pixel_tiles.cuh"
#include "gemm/epilogue_store.cuh"
#include "hopper/sync.h"
#include "hopper/tma.h"
#include "hopper/warp.h"
#include "hopper/wgmma.h"

namespace magihuman::conv {

// Mistakes that tests plant to see the simulator, or a comparison, find them.
enum class Bug {
    kNone,
    kNoWeightWait,        // consumers do not wait for weights
    kEarlyPixelRelease,   // they free a box before its last product is done
    kEarlyWeightRelease,  // they free weights while products read them
    kNoPeerRelease,       // they free weights in their own block only
    kNoDrain,             // a block ends while its peer may still free its stages of weights
    kNoTurnWait,          // swapped, they read pixels before all warps have turned theirs
    kNoClamp,             // frames beyond the clip are fetched as they come
    kStoresBeyondEdge     // pixels beyond the picture's edge are stored
};

constexpr uint32_t kPixelBytes = 128, kGroupBytes = kUnitSide * kPixelBytes;  // 64 channels of one, of eight

// A compiled tile: 2 kUnits units by BLOCK_N output channels, at most 227 KB.
template <int kVerticalTaps, int kTileN, int kUnitsPerGroup, int kUnitHeight, int kBlocks, int kBoxes,
          int kTaps>
struct TileConfig {
    static constexpr int kTapsY = kVerticalTaps, kBlockN = kTileN, kUnits = kUnitsPerGroup;
    static constexpr int kUnitRows = kUnitHeight, kCluster = kBlocks, kPixelStages = kBoxes,
                         kWeightStages = kTaps;
    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
    static constexpr int kBlockUnits = kConsumers * kUnits;
    static constexpr bool kSwapped = kUnitRows > kUnitSide;
    static_assert(!kSwapped || kBlockN == 64, "all output channels are rows of one product");
    // Columns of a product, and parts of 8 x 8 pixels in a unit.
    static constexpr int kColumns = kSwapped ? kUnitRows * kUnitSide : kBlockN,
                         kParts = kUnitRows / kUnitSide;
    static constexpr uint32_t kBoxRows = kUnitRows + kTapsY - 1, kBoxBytes = kBoxRows * kGroupBytes;
    static constexpr uint32_t kPixelStageBytes = kBlockUnits * kBoxBytes;
    static constexpr uint32_t kWeightStageBytes = kBlockN * kPixelBytes;
    static constexpr uint32_t kWeights = kPixelStages * kPixelStageBytes;
    static constexpr uint32_t kStaging = kWeights + kWeightStages * kWeightStageBytes;
    static constexpr uint32_t kWarpStagingBytes = 16 * 128 * 2;  // 16 pixels of 128 channels
    static constexpr uint32_t kTurning = kStaging + 4 * kConsumers * kWarpStagingBytes;
    static constexpr uint32_t kTurningBytes = kSwapped ? 64 * kPixelBytes : 0;  // 64 pixels of 64 channels
    static constexpr uint32_t kBarriers = kTurning + kConsumers * kTurningBytes;
    static constexpr uint32_t kSharedBytes =
        kBarriers + 2 * (kPixelStages + kWeightStages) * static_cast<uint32_t>(sizeof(Barrier));
    static_assert(kSharedBytes <= 227 * 1024);
    static_assert(kUnits * kColumns <= 256, "at most 128 accumulators a thread");
    static constexpr uint32_t kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
    static constexpr Bug kBug = Bug::kNone;
};

template <typename Epilogue>
struct KernelParams {
    TensorMap x, w;
    Grid grid;
    Epilogue epilogue;
};

// Stages in shared memory with a full and an empty barrier each.
template <int kStages, uint32_t kStageBytes>
class Ring {
  public:
    HOPPER_INLINE Ring(uint8_t* stages, uint8_t* barriers)
        : stages_(stages), full_(reinterpret_cast<Barrier*>(barriers)) {}

    HOPPER_INLINE void initialise(int releases, const char* full_name, const char* empty_name) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full_ + i, 1, full_name, i);
            mbarrier_init(full_ + kStages + i, releases, empty_name, i);
        }
    }

    HOPPER_INLINE Barrier* full() const { return full_ + stage; }
    HOPPER_INLINE Barrier* empty(int at) const { return full_ + kStages + at; }
    HOPPER_INLINE uint8_t* data() const { return stages_ + stage * kStageBytes; }

    // The producer's side: room for the next stage, whose bytes are announced.
    HOPPER_INLINE void begin() const {
        mbarrier_wait(empty(stage), phase ^ 1);
        mbarrier_arrive_expect_tx(full(), kStageBytes);
    }
    HOPPER_INLINE void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }

    int stage = 0;
    uint32_t phase = 0;

  private:
    uint8_t* stages_;
    Barrier* full_;
};

template <typename Config>
using PixelRing = Ring<Config::kPixelStages, Config::kPixelStageBytes>;
template <typename Config>
using WeightRing = Ring<Config::kWeightStages, Config::kWeightStageBytes>;

// One thread: the boxes of one tile.
template <typename Config>
HOPPER_INLINE void produce_pixels(PixelRing<Config>& ring, const TensorMap* x, const Grid& grid,
                                  const Tile& tile, int rank) {
    const int first = (tile.group * Config::kCluster + rank) * Config::kBlockUnits;
    const Shift shift = shift_of(grid, tile.phase);
    Unit unit[Config::kBlockUnits];
#pragma unroll
    for (int i = 0; i < Config::kBlockUnits; ++i) unit[i] = unit_at(grid, first + i);
    for (int tap_t = 0; tap_t < grid.taps_t; ++tap_t) {
        int frame[Config::kBlockUnits];
#pragma unroll
        for (int i = 0; i < Config::kBlockUnits; ++i) {
            const int t = unit[i].t + grid.offset_t + tap_t;
            const int inside = Config::kBug == Bug::kNoClamp ? t : min(max(t, 0), grid.length - 1);
            frame[i] = inside % grid.x_frames;
        }
        for (int tap_x = 0; tap_x < grid.taps_x; ++tap_x) {
            for (int chunk = 0; chunk < grid.chunks; ++chunk) {
                ring.begin();
#pragma unroll
                for (int i = 0; i < Config::kBlockUnits; ++i) {
                    tma_load(ring.data() + i * Config::kBoxBytes, x, ring.full(), CacheHint::kNormal,
                             chunk * 64, unit[i].x + grid.offset_x + shift.x + tap_x,
                             unit[i].y + grid.offset_y + shift.y, frame[i]);
                }
                ring.advance();
            }
        }
    }
}

// One thread: this block's part of the weights of one tile.
template <typename Config>
HOPPER_INLINE void produce_weights(WeightRing<Config>& ring, const TensorMap* w, const Grid& grid,
                                   const Tile& tile, int rank) {
    constexpr int kRows = Config::kBlockN / Config::kCluster;
    const int row = tile.phase * grid.channels + tile.n_tile * Config::kBlockN + rank * kRows;
    for (int tap_t = 0; tap_t < grid.taps_t; ++tap_t) {
        for (int tap_x = 0; tap_x < grid.taps_x; ++tap_x) {
            for (int chunk = 0; chunk < grid.chunks; ++chunk) {
                for (int tap_y = 0; tap_y < Config::kTapsY; ++tap_y) {
                    const int tap = (tap_t * Config::kTapsY + tap_y) * grid.taps_x + tap_x;
                    ring.begin();
                    uint8_t* to = ring.data() + rank * kRows * kPixelBytes;
                    if constexpr (Config::kCluster == 1) {
                        tma_load(to, w, ring.full(), CacheHint::kNormal, chunk * 64, tap, row);
                    } else {
                        constexpr uint16_t kBoth = 3;
                        tma_load_multicast(to, w, ring.full(), kBoth, CacheHint::kNormal, chunk * 64, tap,
                                           row);
                    }
                    ring.advance();
                }
            }
        }
    }
}

// The same thread, after its last tile: every stage is free, so no peer will arrive at this block's barriers any more,
// and none has a copy under way to its stages, for those were awaited before they were freed. The block may end.
template <typename Config>
HOPPER_INLINE void drain(WeightRing<Config>& ring) {
    for (int i = 0; i < Config::kWeightStages; ++i) {
        mbarrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
        ring.advance();
    }
}

// This warpgroup is done with a stage of weights: says so in every block that fills a part of it.
template <typename Config>
HOPPER_INLINE void release_weights(const WeightRing<Config>& ring, int stage) {
    const uint32_t thread = threadIdx.x % 128;
    if constexpr (Config::kCluster == 1 || Config::kBug == Bug::kNoPeerRelease) {
        if (thread == 0) mbarrier_arrive(ring.empty(stage));
    } else {
        if (thread < Config::kCluster) mbarrier_arrive_cluster(ring.empty(stage), thread);
    }
}

template <typename Config>
HOPPER_INLINE void release_pixels(const PixelRing<Config>& ring, int stage) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(ring.empty(stage));
}

template <typename Config>
using Accumulators = float[Config::kUnits][Config::kColumns / 2];

// d = this warpgroup's units times BLOCK_N channels, or swapped. `beside(box)` runs beside the products.
template <typename Config, typename Beside>
HOPPER_INLINE void consume(PixelRing<Config>& pixels, WeightRing<Config>& weights, Accumulators<Config>& d,
                           int consumer, int boxes, const Beside& beside) {
    constexpr bool kEarlyPixels = Config::kBug == Bug::kEarlyPixelRelease;
    constexpr bool kEarlyWeights = Config::kBug == Bug::kEarlyWeightRelease;
    int last_box = pixels.stage, last_tap = weights.stage;
    const auto products = [&](int box, [[maybe_unused]] auto first) {
        constexpr bool kFirst = decltype(first)::value;
        mbarrier_wait(pixels.full(), pixels.phase);
        const uint8_t* unit_box = pixels.data() + consumer * Config::kUnits * Config::kBoxBytes;
#pragma unroll
        for (uint32_t tap = 0; tap < Config::kTapsY; ++tap) {
            if (Config::kBug != Bug::kNoWeightWait) mbarrier_wait(weights.full(), weights.phase);
            const uint64_t weights_at = k_major_descriptor<Swizzle::kBytes128>(weights.data());
            wgmma_fence();
#pragma unroll
            for (uint32_t unit = 0; unit < Config::kUnits; ++unit) {
                const uint64_t box_at = k_major_descriptor<Swizzle::kBytes128>(
                    unit_box + unit * Config::kBoxBytes + tap * kGroupBytes);
                const uint64_t a = Config::kSwapped ? weights_at : box_at;
                const uint64_t b = Config::kSwapped ? box_at : weights_at;
#pragma unroll
                for (uint32_t step = 0; step < kPixelBytes / 32; ++step) {
                    wgmma_bf16<Config::kColumns>(d[unit], advance(a, step * 32), advance(b, step * 32),
                                                 !kFirst || tap > 0 || step > 0);
                }
            }
            wgmma_commit();
            if (tap == 0) beside(box);
            if (kEarlyWeights) release_weights<Config>(weights, weights.stage);
            if (!kFirst || tap > 0) {
                // These products run on while the next weights are awaited; those before them are done.
                wgmma_wait<1>();
                if (!kEarlyWeights) release_weights<Config>(weights, last_tap);
                if (tap == 0 && !kEarlyPixels) release_pixels<Config>(pixels, last_box);
            }
            last_tap = weights.stage;
            weights.advance();
        }
        if (kEarlyPixels) release_pixels<Config>(pixels, pixels.stage);
        last_box = pixels.stage;
        pixels.advance();
    };
    // The first box on its own: that it starts from zero is then known to the compiler (gemm/mainloop.cuh).
    products(0, std::true_type{});
    for (int box = 1; box < boxes; ++box) products(box, std::false_type{});
    wgmma_wait<0>();
#pragma unroll
    for (int unit = 0; unit < Config::kUnits; ++unit) wgmma_results(d[unit]);
    if (!kEarlyWeights) release_weights<Config>(weights, last_tap);
    if (!kEarlyPixels) release_pixels<Config>(pixels, last_box);
}

// This warp's share of 8 x 8 pixels: part `part` of unit `index`.
template <typename Config>
HOPPER_INLINE PixelTile warp_share(const Grid& grid, const Tile& tile, int index, int part, int warp,
                                   uint8_t* staging) {
    const Unit unit = unit_at(grid, index);
    const int y = unit.y + part * kUnitSide + 2 * warp;
    int rows = unit.exists ? max(min(grid.height - y, 2), 0) : 0,
        columns = min(grid.width - unit.x, kUnitSide);
    if (Config::kBug == Bug::kStoresBeyondEdge && unit.exists) rows = 2, columns = kUnitSide;
    return {unit.t, y, unit.x, tile.phase, rows, columns, tile.n_tile * Config::kBlockN, staging, lane_id()};
}

// Swapped products hold 16 channels of 256 pixels a warp; v becomes 64 channels of 16 of the 64 pixels of `part`, as
// products of pixels and weights would leave them: bf16(product + bias) goes through `turning`, [64 pixels][128 B],
// chunk c of pixel p at c ^ (p % 8). `bias`: of the lane's two channels.
template <typename Config>
HOPPER_INLINE void turn(float (&v)[32], const float (&d)[Config::kColumns / 2], int part,
                        const float (&bias)[2], uint8_t* turning, uint32_t warp, uint32_t lane,
                        uint32_t barrier) {
    const auto at = [&](uint32_t pixel, uint32_t chunk) {
        return turning + pixel * kPixelBytes + (chunk ^ pixel % 8) * 16;
    };
#pragma unroll
    for (uint32_t row = 0; row < kUnitSide; row += 2) {  // of the picture: two blocks of 8 columns
        const float* u = d + (part * kUnitSide + row) * 4;
        stmatrix_x4<true>(
            at((row + lane / 16) * kUnitSide + lane % 8, 2 * warp + lane / 8 % 2),
            pack_bf16x2(u[0] + bias[0], u[1] + bias[0]), pack_bf16x2(u[2] + bias[1], u[3] + bias[1]),
            pack_bf16x2(u[4] + bias[0], u[5] + bias[0]), pack_bf16x2(u[6] + bias[1], u[7] + bias[1]));
    }
    if (Config::kBug != Bug::kNoTurnWait) named_barrier_sync(barrier, 128);
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
        uint32_t m[4];
        ldmatrix_x4(at(warp * 16 + lane % 16, 2 * j + lane / 16), m);
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            v[8 * j + 2 * i] = low_bf16(m[i]);
            v[8 * j + 2 * i + 1] = high_bf16(m[i]);
        }
    }
    // All have read before anyone writes the next part.
    named_barrier_sync(barrier, 128);
}

template <typename Config, typename Epilogue>
__global__ void __launch_bounds__(Config::kThreads, 1)
    conv_sm90(const __grid_constant__ KernelParams<Epilogue> p) {
    constexpr bool kPaired = Config::kCluster > 1;
    uint8_t* shared = dynamic_shared_memory();
    PixelRing<Config> pixels(shared, shared + Config::kBarriers);
    WeightRing<Config> weights(shared + Config::kWeights,
                               shared + Config::kBarriers + 2 * Config::kPixelStages * sizeof(Barrier));
    const uint32_t warp = warp_id();
    const int rank = kPaired ? static_cast<int>(cluster_rank()) : 0;

    if (warp == 0 && elect_one()) {
        role("setup");
        tma_prefetch_map(&p.x);
        tma_prefetch_map(&p.w);
        pixels.initialise(Config::kConsumers, "full_pixels", "empty_pixels");
        weights.initialise(Config::kConsumers * Config::kCluster, "full_weights", "empty_weights");
        fence_mbarrier_init();
    }
    if constexpr (kPaired) {
        cluster_sync_relaxed();
    } else {
        block_sync();
    }

    const Grid& grid = p.grid;
    const int step = static_cast<int>(gridDim.x) / Config::kCluster;
    const int start = static_cast<int>(blockIdx.x) / Config::kCluster;
    if (warp < 4) {
        registers_release<Config::kProducerRegisters>();
        if (warp == 0 && elect_one()) {
            role("pixels");
            for (int i = start; i < grid.tiles; i += step) {
                produce_pixels<Config>(pixels, &p.x, grid, tile_at(grid, i), rank);
            }
        } else if (warp == 1 && elect_one()) {
            role("weights");
            for (int i = start; i < grid.tiles; i += step) {
                produce_weights<Config>(weights, &p.w, grid, tile_at(grid, i), rank);
            }
            if (kPaired && Config::kBug != Bug::kNoDrain) drain<Config>(weights);
        }
        warp_sync();
    } else {
        role("consumer");
        registers_claim<Config::kConsumerRegisters>();
        const int consumer = static_cast<int>(warp) / 4 - 1, quarter = static_cast<int>(warp) % 4;
        uint8_t* staging = shared + Config::kStaging + (warp - 4) * Config::kWarpStagingBytes;
        const int boxes = grid.taps_t * grid.taps_x * grid.chunks;
        for (int i = start; i < grid.tiles; i += step) {
            const Tile tile = tile_at(grid, i);
            const int first =
                ((tile.group * Config::kCluster + rank) * Config::kConsumers + consumer) * Config::kUnits;
            Accumulators<Config> d;
            consume<Config>(pixels, weights, d, consumer, boxes, [&](int box) {
                if (box != max(boxes - 3, 0)) return;
#pragma unroll 1
                for (int i = 0; i < Config::kUnits * Config::kParts; ++i) {
                    p.epilogue.template prefetch<Config::kBlockN>(
                        grid, warp_share<Config>(grid, tile, first + i / Config::kParts, i % Config::kParts,
                                                 quarter, staging));
                }
            });
            float bias[2] = {0, 0};
            if constexpr (Config::kSwapped) p.epilogue.lane_bias(grid, tile.n_tile * 64, quarter, bias);
#pragma unroll
            for (int i = 0; i < Config::kUnits * Config::kParts; ++i) {
                const int unit = i / Config::kParts, which = i % Config::kParts;
                PixelTile part = warp_share<Config>(grid, tile, first + unit, which, quarter, staging);
                // Else every address of the epilogue would be computed before the loop (gemm.cuh).
                part.lane = gemm::opaque(part.lane);
                if constexpr (Config::kSwapped) {
                    float v[32];
                    uint8_t* turning = shared + Config::kTurning + consumer * Config::kTurningBytes;
                    turn<Config>(v, d[unit], which, bias, turning, quarter, part.lane, 1 + consumer);
                    p.epilogue.template finish<Config::kBlockN>(grid, v, part);
                } else {
                    p.epilogue.template operator()<Config::kBlockN>(grid, d[unit], part);
                }
            }
        }
    }
}

}  // namespace magihuman::conv
