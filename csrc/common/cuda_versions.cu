// What the library was built with and what the driver can run.
#include <cuda_runtime.h>

#include "api.h"

namespace magihuman {

CudaVersions cuda_versions() {
    CudaVersions found{};
    // A question that fails leaves its 0.
    static_cast<void>(cudaRuntimeGetVersion(&found.runtime));
    static_cast<void>(cudaDriverGetVersion(&found.driver));
    return found;
}

}  // namespace magihuman
