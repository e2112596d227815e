#include "sim/shared_memory.h"

#include <cstring>

#include "sim/machine.h"

namespace magihuman::sim {

namespace {

constexpr uint8_t kPoison = 0xff;  // NaN in bf16, fp16 and float32

// Of 2, 4, 8 or 16 bytes: a constant count is one instruction.
inline void copy_word(void* to, const void* from, size_t bytes) {
    switch (bytes) {
        case 2:
            std::memcpy(to, from, 2);
            break;
        case 4:
            std::memcpy(to, from, 4);
            break;
        case 8:
            std::memcpy(to, from, 8);
            break;
        default:
            std::memcpy(to, from, 16);
    }
}

}  // namespace

SharedMemory::SharedMemory() : storage_(new uint8_t[kMaxBytes + 2048]), mirror_(new uint8_t[kMaxBytes + 16]) {
    bytes_ =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.get()) + 1023) & ~uintptr_t{1023});
}

void SharedMemory::reset(uint32_t bytes) {
    size_ = bytes;
    std::memset(bytes_, kPoison, bytes);
    std::memset(mirror_.get(), kPoison, bytes);
    granules_.assign(bytes / 16 + 1, Granule{});
}

bool SharedMemory::holds(const void* pointer) const {
    const auto* p = static_cast<const uint8_t*>(pointer);
    return p >= bytes_ && p < bytes_ + size_;
}

void SharedMemory::fail_outside(int64_t offset, size_t bytes, const char* what) const {
    fail("out of bounds", text("%s: %zu bytes at offset %lld of the block's %u bytes of shared memory", what,
                               bytes, static_cast<long long>(offset), size_));
}

void SharedMemory::begin_async_write(uint32_t offset, uint32_t bytes, const MBarrier& barrier) {
    for (uint32_t i = offset / 16; i < (offset + bytes) / 16; ++i) {
        Granule& g = granules_[i];
        if (g.readers != 0) {
            fail("early overwrite",
                 text("a TMA load for %s overwrites shared offset %u, which %s may still read",
                      barrier.name.c_str(), i * 16, g.reader_name));
        }
        if (g.state == kArriving) {
            fail("early overwrite",
                 text("a TMA load for %s overwrites shared offset %u, where one for %s is under way",
                      barrier.name.c_str(), i * 16, g.bringer->name.c_str()));
        }
        g.state = kArriving;
        g.bringer = &barrier;
        g.bringer_phase = barrier.phase;
    }
    std::memset(bytes_ + offset, kPoison, bytes);
    std::memset(mirror_.get() + offset, kPoison, bytes);
}

void SharedMemory::end_async_write(uint32_t offset, uint32_t bytes) {
    for (uint32_t i = offset / 16; i < (offset + bytes) / 16; ++i) {
        granules_[i].state = kWritten;
        granules_[i].writer = kAsyncProxy;
    }
}

inline void SharedMemory::check_arrived(uint32_t offset, uint32_t bytes, const char* reader) const {
    const Granule& g = granules_[offset / 16];
    const char* hint = "(wait missing, or with the wrong parity)";
    if (g.state == kArriving) {
        fail("read before arrival",
             text("%s reads shared offset %u while the TMA load for %s is under way %s", reader, offset,
                  g.bringer->name.c_str(), hint));
    }
    if (g.state == kUnwritten && same(offset, bytes)) {
        fail("read before arrival",
             text("%s reads shared offset %u, which nothing has written yet %s", reader, offset, hint));
    }
    // The data is there, by luck: had the copy been slower, nothing would have held the reader back.
    if (g.state == kWritten && g.writer == kAsyncProxy && g.bringer->seen <= g.bringer_phase) {
        fail("read before arrival",
             text("%s reads shared offset %u, and nobody has waited for phase %u of %s %s", reader, offset,
                  g.bringer_phase, g.bringer->name.c_str(), hint));
    }
}

inline void SharedMemory::check_unchanged(uint32_t offset, const char* reader) const {
    if (!same(offset, 16)) {
        fail("untracked write",
             text("%s reads shared offset %u, which was written through a plain pointer: write it"
                  " with store_shared or stmatrix",
                  reader, offset));
    }
}

void SharedMemory::begin_async_read(const std::vector<uint32_t>& offsets, const char* reader) {
    for (const uint32_t offset : offsets) {
        Granule& g = granules_[offset / 16];
        check_arrived(offset, 16, reader);
        check_unchanged(offset, reader);
        if (g.writer != kAsyncProxy) {
            const Thread& writer = machine->current->block->threads[g.writer];
            if (writer.proxy_fences == g.writer_epoch) {
                fail("missing proxy fence",
                     text("%s reads shared offset %u, written by thread %u (role %s) without"
                          " fence_proxy_async after it",
                          reader, offset, writer.linear, writer.role));
            }
        }
        ++g.readers;
        g.reader_name = reader;
    }
}

void SharedMemory::end_async_read(const std::vector<uint32_t>& offsets, const char* reader) {
    for (const uint32_t offset : offsets) {
        check_unchanged(offset, reader);
        --granules_[offset / 16].readers;
    }
}

inline void SharedMemory::generic_write(uint32_t offset, const void* from, uint32_t bytes,
                                        const Thread& writer) {
    Granule& g = granules_[offset / 16];  // aligned accesses of at most 16 bytes stay inside one granule
    if (g.readers != 0) {
        fail("early overwrite",
             text("a store overwrites shared offset %u, which %s may still read", offset, g.reader_name));
    }
    if (g.state == kArriving) {
        fail("early overwrite",
             text("a store writes shared offset %u, where the TMA load for %s is under way", offset,
                  g.bringer->name.c_str()));
    }
    g.state = kWritten;
    g.writer = static_cast<uint16_t>(writer.linear);
    g.writer_epoch = writer.proxy_fences;
    copy_word(bytes_ + offset, from, bytes);
    copy_word(mirror_.get() + offset, from, bytes);
}

inline void SharedMemory::generic_read(uint32_t offset, void* to, uint32_t bytes) const {
    check_arrived(offset, bytes, "a load");
    copy_word(to, bytes_ + offset, bytes);
}

uint8_t* dynamic_shared_memory() { return current().block->memory.data(); }

uint32_t shared_address(const void* pointer) {
    const SharedMemory& memory = current().block->memory;
    return SharedMemory::kWindowStart + memory.offset_of(pointer, 0, "address of shared memory");
}

void load_shared_bytes(const void* address, void* to, size_t bytes) {
    const SharedMemory& memory = current().block->memory;
    const uint32_t offset = memory.offset_of(address, bytes, "shared load");
    if ((offset & (bytes - 1)) != 0)
        fail("misaligned", text("shared load of %zu bytes at offset %u", bytes, offset));
    memory.generic_read(offset, to, static_cast<uint32_t>(bytes));
}

void store_shared_bytes(void* address, const void* from, size_t bytes) {
    SharedMemory& memory = current().block->memory;
    const uint32_t offset = memory.offset_of(address, bytes, "shared store");
    if ((offset & (bytes - 1)) != 0)
        fail("misaligned", text("shared store of %zu bytes at offset %u", bytes, offset));
    memory.generic_write(offset, from, static_cast<uint32_t>(bytes), current());
}

void fence_proxy_async() { ++current().proxy_fences; }

}  // namespace magihuman::sim
