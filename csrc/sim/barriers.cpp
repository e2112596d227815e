// mbarriers, named barriers, the cluster barrier, and the operations of one warp.
#include "hopper/mbarrier.h"
#include "sim/machine.h"

namespace magihuman::sim {

namespace {

// Lies in the barrier's eight bytes, so that data written over a barrier is found out.
constexpr uint64_t kBarrierMark = 0xba221e25c0ffee00;

uint32_t offset_of(Barrier* barrier) {
    const uint32_t offset = current().block->memory.offset_of(barrier, sizeof(Barrier), "mbarrier");
    if (offset % 8 != 0)
        fail("misaligned", text("mbarrier at shared offset %u: must be a multiple of 8", offset));
    return offset;
}

void check_published(const MBarrier& b) {
    if (b.published || b.initialiser == &current()) return;
    fail("mbarrier not initialised",
         barrier_name(b) +
             " is used by another thread: neither fence_mbarrier_init nor a barrier of the block"
             " has published it, and cluster_arrive_relaxed does not");
}

MBarrier& own_barrier(Barrier* barrier) {
    MBarrier& b = current().block->barrier(offset_of(barrier));
    check_published(b);
    return b;
}

// What a barrier of the block does for the mbarriers that this thread has initialised.
void publish() {
    Thread& thread = current();
    if (!thread.unpublished) return;
    thread.unpublished = false;
    for (MBarrier& b : thread.block->barriers)
        if (b.initialiser == &thread) b.published = true;
}

void end_phase_if_complete(MBarrier& b) {
    if (b.pending > 0) return;
    if (b.transactions < 0) {
        fail("transaction-count mismatch",
             text("%s received %lld bytes more than were announced in phase %u", barrier_name(b).c_str(),
                  -(long long)b.transactions, b.phase));
    }
    if (b.transactions > 0) return;
    ++b.phase;
    if (b.bytes_in_phase > 0) b.last_data = b.phase;
    b.bytes_in_phase = 0;
    b.pending = b.count;
    machine->wake_all(b.waiters);
}

void arrive(MBarrier& b) {
    if (b.pending == 0) {
        fail("arrival-count mismatch",
             text("more than the %u arrivals of phase %u at %s", b.count, b.phase, barrier_name(b).c_str()));
    }
    --b.pending;
    end_phase_if_complete(b);
}

bool phase_ended(MBarrier& b, uint32_t parity) {
    if (parity > 1)
        fail("wrong phase", text("parity %u at %s: must be 0 or 1", parity, barrier_name(b).c_str()));
    if ((b.phase & 1) == parity) return false;
    b.seen = b.phase;
    return true;
}

}  // namespace

std::string barrier_name(const MBarrier& b) { return b.name; }

MBarrier& Block::barrier(uint32_t offset) {
    const int index = offset / 8 < barrier_at.size() ? barrier_at[offset / 8] : -1;
    if (index < 0)
        fail("mbarrier not initialised", text("shared offset %u is used as an mbarrier before mbarrier_init "
                                              "(block_sync or cluster_sync_relaxed missing?)",
                                              offset));
    MBarrier& b = barriers[index];
    uint64_t mark;
    std::memcpy(&mark, memory.data() + offset, sizeof(mark));
    if (mark != kBarrierMark) fail("out of bounds", barrier_name(b) + " was overwritten by data");
    return b;
}

void mbarrier_init(Barrier* barrier, uint32_t count, const char* name, int index) {
    Block& block = *current().block;
    const uint32_t offset = offset_of(barrier);
    if (count == 0 || count >= 1u << 20)
        fail("arrival-count mismatch", text("mbarrier_init with count %u", count));
    if (block.barrier_at[offset / 8] >= 0) {
        fail("mbarrier initialised twice", block.barriers[block.barrier_at[offset / 8]].name);
    }
    block.barrier_at[offset / 8] = static_cast<int16_t>(block.barriers.size());
    MBarrier& b = block.barriers.emplace_back();
    b.offset = offset;
    b.count = b.pending = count;
    b.initialiser = &current();
    current().unpublished = true;
    b.name = index < 0 ? name : text("%s[%d]", name, index);
    barrier->state = kBarrierMark;
}

void fence_mbarrier_init() {
    publish();
    for (MBarrier& b : current().block->barriers)
        if (b.initialiser == &current()) b.fenced = true;
}

void mbarrier_arrive(Barrier* barrier) {
    arrive(own_barrier(barrier));
    machine->maybe_yield();
}

void mbarrier_arrive_cluster(Barrier* barrier, uint32_t block_rank) {
    if (block_rank >= machine->blocks.size()) {
        fail("out of bounds",
             text("arrival at block rank %u of a cluster of %zu", block_rank, machine->blocks.size()));
    }
    Block& target = *machine->blocks[block_rank];
    MBarrier& b = target.barrier(offset_of(barrier));
    if (target.running == 0) {
        fail("block ended",
             text("arrival at %s of block rank %u, which has ended", barrier_name(b).c_str(), block_rank));
    }
    if (!b.fenced && block_rank != current().block->rank) {
        fail("mbarrier not initialised",
             barrier_name(b) + " is used by another block without fence_mbarrier_init");
    }
    check_published(b);
    arrive(b);
    machine->maybe_yield();
}

void mbarrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
    MBarrier& b = own_barrier(barrier);
    b.transactions += bytes;
    b.bytes_in_phase += bytes;
    if (b.transactions >= 1 << 20)
        fail("transaction-count mismatch", barrier_name(b) + " counts below 2^20 bytes");
    arrive(b);
    machine->maybe_yield();
}

void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes, uint32_t phase,
                             const std::string& who) {
    MBarrier& b = block.barrier(offset);
    if (b.phase != phase) {
        fail("transaction-count mismatch",
             text("%s: %u bytes of phase %u arrive when that phase has ended: fewer were "
                  "announced than copied",
                  who.c_str(), bytes, phase));
    }
    b.transactions -= bytes;
    end_phase_if_complete(b);
}

bool mbarrier_try_wait(Barrier* barrier, uint32_t parity) {
    machine->maybe_yield();
    return phase_ended(own_barrier(barrier), parity);
}

void mbarrier_wait(Barrier* barrier, uint32_t parity) {
    machine->maybe_yield();
    MBarrier& b = own_barrier(barrier);
    const uint32_t first = b.phase;
    while (!phase_ended(b, parity)) {
        if (b.phase != first) {
            fail("phase overrun",
                 text("phase %u of %s ended and so did the next, before this thread could see it", first,
                      barrier_name(b).c_str()));
        }
        b.waiters.push_back(&current());
        machine->suspend({"mbarrier", &b, parity});
    }
}

void named_barrier_arrive(uint32_t id, uint32_t threads) {
    if (id > 15) fail("out of bounds", text("named barrier %u: there are 16", id));
    if (threads == 0 || threads % 32 != 0 || threads > machine->config.threads) {
        fail("arrival-count mismatch",
             text("named barrier %u between %u threads: must be a multiple of 32 up to the "
                  "block's %u",
                  id, threads, machine->config.threads));
    }
    publish();
    NamedBarrier& b = current().block->named[id];
    if (b.threads != 0 && b.threads != threads) {
        fail("arrival-count mismatch",
             text("named barrier %u: %u threads here, %u at an earlier arrival", id, threads, b.threads));
    }
    b.threads = threads;
    if (++b.arrived == threads) {
        b.threads = b.arrived = 0;
        machine->wake_all(b.waiters);
    }
}

void named_barrier_sync(uint32_t id, uint32_t threads) {
    named_barrier_arrive(id, threads);
    NamedBarrier& b = current().block->named[id];
    if (b.arrived == 0) return;  // this was the last arrival
    b.waiters.push_back(&current());
    machine->suspend({"named barrier", nullptr, id});
}

void block_sync() { named_barrier_sync(0, machine->config.threads); }

uint32_t cluster_rank() { return current().block->rank; }
uint32_t cluster_size() { return machine->config.cluster; }

void cluster_arrive_relaxed() {
    const uint64_t all = uint64_t{machine->config.threads} * machine->config.cluster;
    Thread& thread = current();
    if (thread.cluster_target > machine->cluster_arrivals) {
        fail("arrival-count mismatch", "cluster_arrive_relaxed twice without cluster_wait");
    }
    thread.cluster_target = (machine->cluster_arrivals / all + 1) * all;
    if (++machine->cluster_arrivals % all == 0) machine->wake_all(machine->cluster_waiters);
}

void cluster_wait() {
    Thread& thread = current();
    if (thread.cluster_target == 0)
        fail("arrival-count mismatch", "cluster_wait without cluster_arrive_relaxed");
    while (machine->cluster_arrivals < thread.cluster_target) {
        machine->cluster_waiters.push_back(&thread);
        machine->suspend({"cluster barrier", nullptr, 0});
    }
}

bool elect_one() { return current().lane() == machine->elected_lane; }

void set_max_registers(uint32_t count, bool) {
    Warpgroup& group = *current().warpgroup;
    group.max_registers = count;
}

const uint64_t* warp_exchange(const char* operation, uint64_t word) {
    Thread& thread = current();
    Warp& warp = *thread.warp;
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation && std::strcmp(warp.operation, operation) != 0) {
        fail("divergent warp",
             text("lane %u runs %s while others run %s", thread.lane(), operation, warp.operation));
    }
    if (warp.ended != 0) {
        fail("divergent warp",
             text("%s by a warp whose lane %d has ended", operation, __builtin_ctz(warp.ended)));
    }
    const uint32_t parity = warp.generation & 1;
    warp.given[thread.lane()] = word;
    warp.arrived |= 1u << thread.lane();
    if (warp.arrived != 0xffffffff) {
        machine->suspend({operation, nullptr, thread.lane()});
        return warp.result[parity];
    }
    std::memcpy(warp.result[parity], warp.given, sizeof(warp.given));
    warp.arrived = 0;
    ++warp.generation;
    machine->wake_lanes(&warp, ~(1u << thread.lane()));
    return warp.result[parity];
}

void warp_sync() {
    publish();
    warp_exchange("warp_sync", 0);
}

uint32_t ballot(bool predicate) {
    const uint64_t* lanes = warp_exchange("ballot", predicate);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(lanes[i]) << i;
    return bits;
}

namespace {

// Shared address of the 16-bit element (or pair, not transposed) of matrix i that this lane's register holds.
uint8_t* matrix_element(const uint64_t* rows, uint32_t i, uint32_t lane, bool transposed, uint32_t half) {
    const uint32_t row = transposed ? 2 * (lane % 4) + half : lane / 4;
    const uint32_t column = transposed ? lane / 4 : 2 * (lane % 4) + half;
    return reinterpret_cast<uint8_t*>(rows[8 * i + row]) + 2 * column;
}

const uint64_t* exchange_rows(const char* operation, const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail("misaligned", text("%s: row address not a multiple of 16", operation));
    return warp_exchange(operation, reinterpret_cast<uint64_t>(row));
}

}  // namespace

void stmatrix(void* row, const uint32_t (&registers)[4], bool transposed) {
    const uint64_t* rows = exchange_rows("stmatrix", row);
    const uint32_t lane = current().lane();
    for (uint32_t i = 0; i < 4; ++i) {
        if (!transposed) {  // both halves lie side by side
            store_shared_bytes(matrix_element(rows, i, lane, false, 0), &registers[i], 4);
            continue;
        }
        for (uint32_t half = 0; half < 2; ++half) {
            const auto element = static_cast<uint16_t>(registers[i] >> 16 * half);
            store_shared_bytes(matrix_element(rows, i, lane, true, half), &element, 2);
        }
    }
    warp_exchange("stmatrix end", 0);  // aligned: no lane goes on before all have stored
}

void ldmatrix(const void* row, uint32_t (&registers)[4], bool transposed) {
    const uint64_t* rows = exchange_rows("ldmatrix", row);
    const uint32_t lane = current().lane();
    for (uint32_t i = 0; i < 4; ++i) {
        if (!transposed) {
            load_shared_bytes(matrix_element(rows, i, lane, false, 0), &registers[i], 4);
            continue;
        }
        uint16_t element[2];
        for (uint32_t half = 0; half < 2; ++half) {
            load_shared_bytes(matrix_element(rows, i, lane, true, half), &element[half], 2);
        }
        registers[i] = element[0] | uint32_t{element[1]} << 16;
    }
}

}  // namespace magihuman::sim
