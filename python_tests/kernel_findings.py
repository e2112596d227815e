"""What checks of the kernels may find, for tests that have no GPU to check."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from magihuman_fast.kernels import ops
from magihuman_fast.kernels.self_check.cases import CASES
from magihuman_fast.kernels.self_check.child import Finding, Limits

GPU = torch.device("cuda:0")
RIGHT = {name: Finding(name, "right", "", 0.001, 0.01, 0.1) for name in CASES}
MODEL_FAULT = Finding("gated_attention (window; 128x176)", "wrong", "differs from PyTorch", 3.0, 0.0125)
DECODER_FAULT = Finding("conv_picture (bytes)", "wrong", "did not end within 20 s")
MODEL_REASON = (
    "1 of 35 kernels are wrong on this GPU: gated_attention (window; 128x176) differs from PyTorch by 3, "
    "allowed are 0.0125"
)
DECODER_REASON = "1 of 24 kernels are wrong on this GPU: conv_picture (bytes) did not end within 20 s"


class Checks:
    """Stands in for the children: each check finds `faults`, all else is right; `count` is how many there were."""

    def __init__(self) -> None:
        self.faults: tuple[Finding, ...] = ()
        self.count = 0

    def __call__(
        self, kernels: Sequence[str], device: torch.device, backend: ops.Backend, limits: Limits
    ) -> list[Finding]:
        assert list(kernels) == list(CASES)
        self.count += 1
        found = RIGHT | {fault.kernel: fault for fault in self.faults}
        return list(found.values())
