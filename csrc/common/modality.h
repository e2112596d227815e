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

// Ranges in a buffer of `capacity` rows; without offsets every row is live (and video).
HOPPER_INLINE ModalityRanges load_ranges(const int* modality_offsets, int capacity) {
    if (modality_offsets == nullptr) return {capacity, capacity, capacity};
    return {load_global_constant(modality_offsets + 1), load_global_constant(modality_offsets + 2),
            min(load_global_constant(modality_offsets + 3), capacity)};
}

// Multiprocessors of a persistent grid: as asked for, or all of the device's.
inline uint32_t processors(int num_sms) {
    return num_sms > 0 ? static_cast<uint32_t>(num_sms) : multiprocessor_count();
}

}  // namespace magihuman
