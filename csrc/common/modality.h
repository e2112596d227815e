// Which rows are in use, and whose they are, as kernels read it from device memory.
#pragma once

#include "hopper/device.h"
#include "hopper/launch.h"
#include "hopper/memory.h"

namespace magihuman {

struct ModalityRanges {
    int first_audio, first_text, rows;

    // 0 video, 1 audio, 2 text
    __host__ __device__ int group_of(int row) const { return (row >= first_audio) + (row >= first_text); }
};

// Ranges in a buffer of `capacity` rows; without offsets every row is live (and video). Offsets that do not fit the
// buffer, or one another, are cut to what does: nobody has looked at them, and no kernel may leave its buffers.
HOPPER_INLINE ModalityRanges load_ranges(const int* modality_offsets, int capacity) {
    if (modality_offsets == nullptr) return {capacity, capacity, capacity};
    const int rows = min(max(load_global_constant(modality_offsets + 3), 0), capacity);
    const int first_text = min(max(load_global_constant(modality_offsets + 2), 0), rows);
    return {min(max(load_global_constant(modality_offsets + 1), 0), first_text), first_text, rows};
}

// Multiprocessors of a persistent grid: as asked for, or all of the device's.
inline uint32_t processors(int num_sms) {
    return num_sms > 0 ? static_cast<uint32_t>(num_sms) : multiprocessor_count();
}

}  // namespace magihuman
