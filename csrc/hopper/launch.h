// Launching a kernel: one call for the device and for the simulator.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "hopper/device.h"

namespace magihuman {

struct LaunchConfig {
    const char* kernel_name;  // for messages
    dim3 grid;
    uint32_t threads;           // per block, one-dimensional
    uint32_t cluster = 1;       // blocks per cluster along x; divides grid.x
    uint32_t shared_bytes = 0;  // dynamic shared memory
    cudaStream_t stream = nullptr;
};

// Multiprocessors to spread a persistent grid over.
inline uint32_t multiprocessor_count() {
#if defined(MAGIHUMAN_SIM)
    return sim::multiprocessor_count();
#else
    int device = 0, count = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("no CUDA device to launch on: ") + cudaGetErrorString(error));
    }
    return static_cast<uint32_t>(count);
#endif
}

// Throws if the launch is refused. On the device nothing is awaited and nothing is allocated, so that a
// launch can be captured; in the simulator the whole grid has run on return, or an error names what went
// wrong.
template <typename... Params, typename... Arguments>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Arguments&&... arguments) {
#if defined(MAGIHUMAN_SIM)
    std::tuple<Params...> params(std::forward<Arguments>(arguments)...);
    sim::run_grid({config.kernel_name, config.grid, config.threads, config.cluster, config.shared_bytes},
                  [&] { std::apply(kernel, params); });
#else
    const auto check = [&](cudaError_t error, const char* step) {
        if (error != cudaSuccess) {
            throw std::runtime_error(std::string(config.kernel_name) + ": " + step + ": " +
                                     cudaGetErrorString(error));
        }
    };
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.shared_bytes)),
          "shared memory size");
    if (config.cluster > 8) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
              "cluster size");
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = dim3(config.threads);
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = config.stream;
    launch_config.attrs = &attribute;
    launch_config.numAttrs = config.cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&launch_config, kernel, Params(std::forward<Arguments>(arguments))...),
          "launch");
#endif
}

}  // namespace magihuman
