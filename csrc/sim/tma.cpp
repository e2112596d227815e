// The copy engine.
#include "hopper/tma.h"

#include "sim/machine.h"

namespace magihuman::sim {

namespace {

// Calls visit(shared offset within the box, global pointer, valid bytes) for each inner row of the box: the
// first `skip` bytes of the row lie before the tensor, `valid` bytes inside, the rest beyond it.
template <typename Visit>
void for_each_row(const TensorMapSpec& map, const int* c, Visit visit) {
    const uint32_t element = element_bytes(map.type);
    const uint32_t row_bytes = map.box[0] * element;
    uint64_t rows = 1;
    for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
    for (uint64_t row = 0; row < rows; ++row) {
        uint64_t rest = row;
        bool inside = true;
        const auto* address = static_cast<const uint8_t*>(map.base);
        for (uint32_t d = 1; d < map.rank; ++d) {
            const int64_t at = c[d] + static_cast<int64_t>(rest % map.box[d]);
            rest /= map.box[d];
            if (at < 0 || at >= static_cast<int64_t>(map.dims[d])) inside = false;
            address += at * static_cast<int64_t>(map.strides[d - 1]);
        }
        const int64_t first = std::max<int64_t>(c[0], 0);
        const int64_t last = std::min<int64_t>(int64_t{c[0]} + map.box[0], static_cast<int64_t>(map.dims[0]));
        const uint32_t skip = static_cast<uint32_t>(first - c[0]) * element;
        const uint32_t valid = inside && last > first ? static_cast<uint32_t>(last - first) * element : 0;
        visit(static_cast<uint32_t>(row) * row_bytes, address + first * element, skip, valid);
    }
}

// A row as it lies in shared memory: 16-byte chunks, each where the swizzle puts it. The XOR works on address
// bits, and the window starts at a multiple of the period, so offsets serve.
template <typename Chunk>
void for_each_chunk(uint32_t offset, uint32_t bytes, Swizzle swizzle, Chunk chunk) {
    for (uint32_t at = 0; at < bytes; at += 16) chunk(swizzle_offset(offset + at, swizzle), at);
}

struct TmaLoad final : AsyncOp {
    TmaLoad() : AsyncOp(AsyncKind::kLoad) {}
    TensorMapSpec map;
    int coordinates[5];
    Block* block;
    uint32_t destination, barrier, phase;

    void complete() override {
        const uint32_t row_bytes = map.box[0] * element_bytes(map.type);
        std::vector<uint8_t> row(row_bytes);
        for_each_row(
            map, coordinates, [&](uint32_t offset, const uint8_t* from, uint32_t skip, uint32_t valid) {
                std::memset(row.data(), 0, row_bytes);
                if (valid > 0) std::memcpy(row.data() + skip, from, valid);
                for_each_chunk(destination + offset, row_bytes, map.swizzle, [&](uint32_t to, uint32_t at) {
                    block->memory.async_write(to, row.data() + at);
                });
            });
        block->memory.end_async_write(destination, map.box_bytes());
        mbarrier_complete_bytes(*block, barrier, map.box_bytes(), phase,
                                "TMA load for " + barrier_name(block->barrier(barrier)));
    }
};

struct TmaStore final : AsyncOp {
    TmaStore() : AsyncOp(AsyncKind::kStore) {}
    TensorMapSpec map;
    int coordinates[5];
    Thread* thread;
    size_t group;
    uint32_t source;
    std::string reader;
    std::vector<uint32_t> granules;
    std::vector<uint8_t> rows;

    // First the tile is read: its shared memory is free from then on.
    void read() {
        SharedMemory& memory = thread->block->memory;
        const uint32_t row_bytes = map.box[0] * element_bytes(map.type);
        rows.resize(map.box_bytes());
        memory.end_async_read(granules, reader.c_str());
        for (uint32_t offset = 0; offset < rows.size(); offset += row_bytes) {
            for_each_chunk(source + offset, row_bytes, map.swizzle, [&](uint32_t from, uint32_t at) {
                std::memcpy(rows.data() + offset + at, memory.data() + from, 16);
            });
        }
        --thread->bulk[group].reads;
    }
    void write() {
        for_each_row(map, coordinates,
                     [&](uint32_t offset, const uint8_t* to, uint32_t skip, uint32_t valid) {
                         if (valid > 0)
                             std::memcpy(const_cast<uint8_t*>(to), rows.data() + offset + skip, valid);
                     });
        --thread->bulk[group].writes;
    }
    void wake() const {
        if (thread->waiting.what != nullptr && std::strncmp(thread->waiting.what, "TMA store", 9) == 0)
            machine->wake(thread);
    }
    void complete() override {
        if (rows.empty()) {
            read();
            machine->post(std::make_unique<TmaStore>(std::move(*this)));
        } else {
            write();
        }
        wake();
    }
};

const TensorMapSpec& checked_map(const TensorMap* map, int rank) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
        fail("misaligned", "tensor map: must lie at a multiple of 64 bytes");
    if (map->magic != kTensorMapMagic) fail("tensor map", "not made by make_tensor_map");
    if (rank != 0 && static_cast<uint32_t>(rank) != map->spec.rank) {
        fail("tensor map", text("%d coordinates for a map of rank %u", rank, map->spec.rank));
    }
    return map->spec;
}

uint32_t checked_tile(const TensorMapSpec& map, const void* pointer, const char* what) {
    const uint32_t offset = current().block->memory.offset_of(pointer, map.box_bytes(), what);
    const uint32_t alignment = std::max(128u, swizzle_period(map.swizzle));
    if (offset % alignment != 0) {
        fail("misaligned",
             text("%s: tile at shared offset %u, must be a multiple of %u", what, offset, alignment));
    }
    return offset;
}

bool bulk_done(const Thread& thread, uint32_t groups, bool only_reads) {
    for (size_t i = 0; i + 1 + groups < thread.bulk.size(); ++i) {
        if (thread.bulk[i].reads > 0 || (!only_reads && thread.bulk[i].writes > 0)) return false;
    }
    return true;
}

}  // namespace

void tma_check_map(const TensorMap* map) { checked_map(map, 0); }

void tma_load(void* destination, const TensorMap* map, Barrier* barrier, uint32_t block_mask,
              const int* coordinates, int rank) {
    const TensorMapSpec& spec = checked_map(map, rank);
    Block& own = *current().block;
    const uint32_t offset = checked_tile(spec, destination, "TMA load");
    const uint32_t barrier_offset = own.memory.offset_of(barrier, sizeof(Barrier), "mbarrier of a TMA load");
    if (block_mask == 0) block_mask = 1u << own.rank;
    if (block_mask >> machine->blocks.size() != 0) {
        fail("out of bounds",
             text("multicast mask 0x%x in a cluster of %zu blocks", block_mask, machine->blocks.size()));
    }
    ++counters.tma_loads;
    for (const auto& block : machine->blocks) {
        if ((block_mask >> block->rank & 1) == 0) continue;
        MBarrier& b = block->barrier(barrier_offset);
        if (!b.fenced) {
            fail("mbarrier not initialised",
                 barrier_name(b) + " is given to the copy engine without fence_mbarrier_init");
        }
        if (block->running == 0)
            fail("block ended", text("multicast to block rank %u, which has ended", block->rank));
        block->memory.begin_async_write(offset, spec.box_bytes(), b);
        auto op = std::make_unique<TmaLoad>();
        op->map = spec;
        std::copy_n(coordinates, rank, op->coordinates);
        op->block = block.get();
        op->destination = offset;
        op->barrier = barrier_offset;
        op->phase = b.phase;
        machine->post(std::move(op));
    }
    machine->maybe_yield();
}

void tma_store(const TensorMap* map, const void* source, const int* coordinates, int rank) {
    const TensorMapSpec& spec = checked_map(map, rank);
    Thread& thread = current();
    auto op = std::make_unique<TmaStore>();
    op->map = spec;
    std::copy_n(coordinates, rank, op->coordinates);
    op->thread = &thread;
    op->group = thread.bulk.size() - 1;
    op->source = checked_tile(spec, source, "TMA store");
    op->reader = text("a TMA store by role %s", thread.role);
    for (uint32_t at = 0; at < spec.box_bytes(); at += 16) op->granules.push_back(op->source + at);
    thread.block->memory.begin_async_read(op->granules, op->reader.c_str());
    ++thread.bulk.back().reads;
    ++thread.bulk.back().writes;
    ++counters.tma_stores;
    machine->post(std::move(op));
    machine->maybe_yield();
}

void tma_store_commit() { current().bulk.emplace_back(); }

void tma_store_wait(uint32_t groups, bool only_reads) {
    Thread& thread = current();
    while (!bulk_done(thread, groups, only_reads)) {
        machine->suspend(
            {only_reads ? "TMA store reads, groups left" : "TMA stores, groups left", nullptr, groups});
    }
    const size_t committed = thread.bulk.size() - 1;
    if (committed > groups) thread.bulk_reads_waited = std::max(thread.bulk_reads_waited, committed - groups);
}

}  // namespace magihuman::sim
