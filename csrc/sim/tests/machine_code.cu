// Instantiates the sample kernels so that a test can look at the machine code of every instruction wrapper.
#include "hopper/launch.h"
#include "sim/tests/kernels.cuh"

namespace magihuman::samples {

using enum Major;
using enum Swizzle;

template __global__ void gemm_sample<Bug::kNone>(const __grid_constant__ GemmSampleParams);
template __global__ void wgmma_sample<256, kK, kMN, kBytes128, false>(
    const __grid_constant__ WgmmaSampleParams);
template __global__ void wgmma_sample<64, kMN, kMN, kBytes64, false>(
    const __grid_constant__ WgmmaSampleParams);
template __global__ void wgmma_sample<96, kK, kMN, kBytes128, true>(
    const __grid_constant__ WgmmaSampleParams);
template __global__ void copy_sample<2>(const __grid_constant__ CopySampleParams);
template __global__ void copy_sample<3>(const __grid_constant__ CopySampleParams);
template __global__ void copy_sample<4>(const __grid_constant__ CopySampleParams);
template __global__ void copy_sample<5>(const __grid_constant__ CopySampleParams);
template __global__ void multicast_sample<ClusterBug::kNone>(const __grid_constant__ MulticastSampleParams);
template __global__ void warp_sample<32>(const uint16_t*, uint16_t*, float*, uint32_t*);

__global__ void number_sample(float* values) {
    const float x = values[threadIdx.x];
    values[threadIdx.x] = sigmoid(x) * fast_rsqrt(x) + to_float(to_bf16(x)) + to_float(to_fp16(x));
}

void launch_samples(const TensorMapSpec& spec, cudaStream_t stream) {
    const CopySampleParams params{
        make_tensor_map(spec, "from"), make_tensor_map(spec, "to"), spec.box_bytes(), {}, {}};
    launch(copy_sample<2>, {"copy_sample", dim3(multiprocessor_count()), 32, 1, params.bytes + 8, stream},
           params);
}

}  // namespace magihuman::samples
