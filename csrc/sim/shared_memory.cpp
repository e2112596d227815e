#include "sim/shared_memory.h"

#include <cstring>

#include "sim/machine.h"

namespace magihuman::sim {

namespace {
constexpr uint8_t kPoison = 0xff;  // NaN in bf16, fp16 and float32
}

SharedMemory::SharedMemory() : storage_(new uint8_t[kMaxBytes + 2048]), mirror_(new uint8_t[kMaxBytes + 16]) {
    bytes_ =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.get()) + 1023) & ~uintptr_t{1023});
}

void SharedMemory::reset(uint32_t bytes) {
    size_ = bytes;
    std::memset(bytes_, kPoison, bytes);
    std::memset(mirror_.get(), kPoison, bytes);
    const size_t granules = bytes / 16 + 1;
    state_.assign(granules, kUnwritten);
    readers_.assign(granules, 0);
    reader_name_.assign(granules, nullptr);
    writer_.assign(granules, kAsyncProxy);
    writer_epoch_.assign(granules, 0);
    bringer_.assign(granules, nullptr);
    bringer_phase_.assign(granules, 0);
}

bool SharedMemory::holds(const void* pointer) const {
    const auto* p = static_cast<const uint8_t*>(pointer);
    return p >= bytes_ && p < bytes_ + size_;
}

uint32_t SharedMemory::offset_of(const void* pointer, size_t bytes, const char* what) const {
    const auto offset = static_cast<const uint8_t*>(pointer) - bytes_;
    if (offset < 0 || offset + static_cast<int64_t>(bytes) > size_) {
        fail("out of bounds", text("%s: %zu bytes at offset %lld of the block's %u bytes of shared memory",
                                   what, bytes, static_cast<long long>(offset), size_));
    }
    return static_cast<uint32_t>(offset);
}

void SharedMemory::begin_async_write(uint32_t offset, uint32_t bytes, const MBarrier& barrier) {
    for (uint32_t g = offset / 16; g < (offset + bytes) / 16; ++g) {
        if (readers_[g] != 0) {
            fail("early overwrite",
                 text("a TMA load for %s overwrites shared offset %u, which %s may still read",
                      barrier.name.c_str(), g * 16, reader_name_[g]));
        }
        if (state_[g] == kArriving) {
            fail("early overwrite",
                 text("a TMA load for %s overwrites shared offset %u, where one for %s is under way",
                      barrier.name.c_str(), g * 16, bringer_[g]->name.c_str()));
        }
    }
    const uint32_t first = offset / 16, count = bytes / 16;
    std::fill_n(state_.begin() + first, count, kArriving);
    std::fill_n(bringer_.begin() + first, count, &barrier);
    std::fill_n(bringer_phase_.begin() + first, count, barrier.phase);
    std::memset(bytes_ + offset, kPoison, bytes);
    std::memset(mirror_.get() + offset, kPoison, bytes);
}

void SharedMemory::async_write(uint32_t offset, const void* from, uint32_t bytes) {
    std::memcpy(bytes_ + offset, from, bytes);
    std::memcpy(mirror_.get() + offset, from, bytes);
}

void SharedMemory::end_async_write(uint32_t offset, uint32_t bytes) {
    const uint32_t first = offset / 16, count = bytes / 16;
    std::fill_n(state_.begin() + first, count, kWritten);
    std::fill_n(writer_.begin() + first, count, kAsyncProxy);
}

void SharedMemory::check_arrived(uint32_t offset, uint32_t bytes, const char* reader) const {
    const uint32_t g = offset / 16;
    const char* hint = "(wait missing, or with the wrong parity)";
    if (state_[g] == kArriving) {
        fail("read before arrival",
             text("%s reads shared offset %u while the TMA load for %s is under way %s", reader, offset,
                  bringer_[g]->name.c_str(), hint));
    }
    if (state_[g] == kUnwritten && std::memcmp(bytes_ + offset, mirror_.get() + offset, bytes) == 0) {
        fail("read before arrival",
             text("%s reads shared offset %u, which nothing has written yet %s", reader, offset, hint));
    }
    // The data is there, by luck: had the copy been slower, nothing would have held the reader back.
    if (state_[g] == kWritten && writer_[g] == kAsyncProxy && bringer_[g]->seen <= bringer_phase_[g]) {
        fail("read before arrival",
             text("%s reads shared offset %u, and nobody has waited for phase %u of %s %s", reader, offset,
                  bringer_phase_[g], bringer_[g]->name.c_str(), hint));
    }
}

void SharedMemory::begin_async_read(uint32_t offset, const char* reader) {
    const uint32_t g = offset / 16;
    check_arrived(offset, 16, reader);
    check_unchanged(offset, reader);
    if (writer_[g] != kAsyncProxy) {
        const Thread& writer = machine->current->block->threads[writer_[g]];
        if (writer.proxy_fences == writer_epoch_[g]) {
            fail(
                "missing proxy fence",
                text(
                    "%s reads shared offset %u, written by thread %u (role %s) without fence_proxy_async after it",
                    reader, offset, writer.linear, writer.role));
        }
    }
    ++readers_[g];
    reader_name_[g] = reader;
}

void SharedMemory::check_unchanged(uint32_t offset, const char* reader) const {
    if (std::memcmp(bytes_ + offset, mirror_.get() + offset, 16) != 0) {
        fail("untracked write",
             text("%s reads shared offset %u, which was written through a plain pointer: write it"
                  " with store_shared or stmatrix",
                  reader, offset));
    }
}

void SharedMemory::generic_write(uint32_t offset, const void* from, uint32_t bytes, const Thread& writer) {
    const uint32_t g = offset / 16;  // aligned accesses of at most 16 bytes stay inside one granule
    if (readers_[g] != 0) {
        fail("early overwrite",
             text("a store overwrites shared offset %u, which %s may still read", offset, reader_name_[g]));
    }
    if (state_[g] == kArriving) {
        fail("early overwrite",
             text("a store writes shared offset %u, where the TMA load for %s is under way", offset,
                  bringer_[g]->name.c_str()));
    }
    state_[g] = kWritten;
    writer_[g] = static_cast<uint16_t>(writer.linear);
    writer_epoch_[g] = writer.proxy_fences;
    async_write(offset, from, bytes);
}

void SharedMemory::generic_read(uint32_t offset, void* to, uint32_t bytes) const {
    check_arrived(offset, bytes, "a load");
    std::memcpy(to, bytes_ + offset, bytes);
}

uint8_t* dynamic_shared_memory() { return current().block->memory.data(); }

uint32_t shared_address(const void* pointer) {
    const SharedMemory& memory = current().block->memory;
    return SharedMemory::kWindowStart + memory.offset_of(pointer, 0, "address of shared memory");
}

void load_shared_bytes(const void* address, void* to, size_t bytes) {
    const SharedMemory& memory = current().block->memory;
    const uint32_t offset = memory.offset_of(address, bytes, "shared load");
    if (offset % bytes != 0) fail("misaligned", text("shared load of %zu bytes at offset %u", bytes, offset));
    memory.generic_read(offset, to, static_cast<uint32_t>(bytes));
}

void store_shared_bytes(void* address, const void* from, size_t bytes) {
    SharedMemory& memory = current().block->memory;
    const uint32_t offset = memory.offset_of(address, bytes, "shared store");
    if (offset % bytes != 0)
        fail("misaligned", text("shared store of %zu bytes at offset %u", bytes, offset));
    memory.generic_write(offset, from, static_cast<uint32_t>(bytes), current());
}

void fence_proxy_async() { ++current().proxy_fences; }

}  // namespace magihuman::sim
