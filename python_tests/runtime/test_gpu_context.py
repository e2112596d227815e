"""How the kernels meet the driver: a thread that has no context yet, and a driver that is too old."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from magihuman_fast.kernels import ops

ROOT = Path(__file__).resolve().parents[2]

# The tensors are the main thread's; the product is the process's first one and the thread's first act on the GPU.
FIRST_ACT = """
import threading
import torch
from magihuman_fast import ops

torch.manual_seed(0)
a = torch.randn(300, 520, device="cuda").bfloat16()
w = torch.randn(1, 264, 520, device="cuda").bfloat16()
expected = a.double() @ w[0].double().T
out = torch.full((300, 264), torch.nan, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
failed = []

def work():
    try:
        ops.gemm(a, w, out=out)
    except Exception as error:
        failed.append(error)

thread = threading.Thread(target=work)
thread.start()
thread.join()
assert not failed, failed
torch.cuda.synchronize()
error = (out.double() - expected).abs()
assert (error <= 2.0**-7 * expected.abs() + 2.0**-8).all(), error.max()
"""


@pytest.mark.gpu
def test_product_as_the_first_act_of_a_thread() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_ACT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kernels_and_driver(monkeypatch: pytest.MonkeyPatch, built: int, driver: int) -> None:
    """As if the kernels were built with one version of CUDA and the machine's driver had another."""
    kernels = ModuleType("kernels")
    vars(kernels)["cuda_versions"] = lambda: (built, driver)
    monkeypatch.setattr("magihuman_fast.kernels.launch._module", lambda name: kernels)


@pytest.mark.parametrize(
    ("built", "driver", "message"),
    [
        (13000, 12040, "the driver supports CUDA 12.4, the kernels were built with 13.0: update the driver"),
        (12080, 11080, "the driver supports CUDA 11.8, the kernels were built with 12.8: update the driver"),
    ],
)
def test_driver_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, built: int, driver: int, message: str
) -> None:
    kernels_and_driver(monkeypatch, built, driver)
    # torch may be too new for the driver itself, and then sees no device.
    for device in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device)
        assert ops.gpu_unavailable() == message


# The same major version, however old; a newer one; no driver at all.
@pytest.mark.parametrize("driver", [12000, 12080, 13010, 0])
def test_driver_that_is_not_to_blame(monkeypatch: pytest.MonkeyPatch, driver: int) -> None:
    kernels_and_driver(monkeypatch, 12080, driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.gpu_unavailable() == "no CUDA device"
