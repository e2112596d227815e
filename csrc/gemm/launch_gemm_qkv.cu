#include "gemm/epilogue_qkv.cuh"
#include "gemm/launch.cuh"

namespace magihuman {

void launch_gemm_qkv(const GemmQkvParams& params, Stream stream) {
    constexpr const char* kName = "gemm_qkv";
    const Arguments check(kName);
    gemm::check_problem(check, params.g);
    const int hq = params.num_q_heads, hkv = params.num_kv_heads;
    check.require(hq >= 1 && hq < 1 << 16, "num_q_heads", "1 to 65535", hq);
    check.require(hkv >= 1 && hkv < 1 << 16, "num_kv_heads", "1 to 65535", hkv);
    check.require(params.g.n == gemm::QkvEpilogue::kHead * (hq + 2 * hkv) + hq, "n",
                  "128 (num_q_heads + 2 num_kv_heads) + num_q_heads", params.g.n);
    check.require_pointer(params.q_norm, "q_norm", 8);
    check.require_pointer(params.k_norm, "k_norm", 8);
    check.require_pointer(params.rope, "rope", 8);
    check.require_pointer(params.q, "q", 16);
    check.require_pointer(params.k, "k", 16);
    check.require_pointer(params.v, "v", 16);
    check.require_pointer(params.gate, "gate", 4);
    gemm::launch_product(
        params.g, params.g.n,
        gemm::QkvEpilogue{params.q_norm, params.k_norm, params.rope, static_cast<bf16*>(params.q),
                          static_cast<bf16*>(params.k), static_cast<bf16*>(params.v), params.gate, hq, hkv},
        kName, stream);
}

}  // namespace magihuman
