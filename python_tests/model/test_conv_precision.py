"""cuDNN's settings around the VAEs' convolutions, whichever of torch's two ways set them; they need no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path

import pytest
import torch

from magihuman_fast.model.conv_precision import conv_precision

backends, cudnn = torch.backends, torch.backends.cudnn
Reads = list[tuple[object, ...]]


def block(allow_tf32: bool = False) -> AbstractContextManager[None]:
    return conv_precision(torch.device("cuda"), allow_tf32)


def old_way() -> object:
    try:
        return cudnn.allow_tf32
    except RuntimeError:  # the new way's settings differ from it
        return "mixed"


def settings() -> Reads:
    """All that can be told of the settings: what each reads as, under every setting that it may inherit."""
    of_all = backends.fp32_precision
    backends.fp32_precision = "none"
    of_cudnn = cudnn.fp32_precision
    found: Reads = [(of_all, of_cudnn, cudnn.deterministic, cudnn.benchmark, cudnn.enabled)]
    for backends.fp32_precision, cudnn.fp32_precision in product(("none", "ieee", "tf32"), repeat=2):
        operations = (cudnn.conv, cudnn.rnn, backends.cuda.matmul)
        found.append((*(operation.fp32_precision for operation in operations), old_way()))
    backends.fp32_precision, cudnn.fp32_precision = of_all, of_cudnn
    return found


def put(old: bool, conv: str | None, of_cudnn: str, of_all: str) -> None:
    """Settings as a caller makes them: `allow_tf32`, then the newer ones; `conv` None: left as the old one made it."""
    cudnn.allow_tf32 = old
    if conv is not None:
        cudnn.conv.fp32_precision = conv
    cudnn.fp32_precision, backends.fp32_precision = of_cudnn, of_all


@pytest.fixture(autouse=True)
def _initial_settings() -> Iterator[None]:
    yield
    put(True, None, "none", "none")
    cudnn.deterministic = False


def check_block(allow_tf32: bool) -> None:
    before, precision = settings(), cudnn.conv.fp32_precision
    with block(allow_tf32):
        assert cudnn.deterministic
        assert cudnn.conv.fp32_precision in ((precision,) if allow_tf32 else ("ieee", "none"))
    assert settings() == before


PRECISIONS = ("none", "ieee", "tf32")


@pytest.mark.parametrize("of_all", [*PRECISIONS, "bf16"])
@pytest.mark.parametrize("of_cudnn", PRECISIONS)
@pytest.mark.parametrize("conv", [None, *PRECISIONS])
@pytest.mark.parametrize("old", [False, True])
def test_float32_and_back(old: bool, conv: str | None, of_cudnn: str, of_all: str) -> None:
    for allow_tf32 in (False, True):
        put(old, conv, of_cudnn, of_all)
        check_block(allow_tf32)


INITIAL = """
import sys
sys.path.append("python_tests/model")
from test_conv_precision import *
for of_cudnn, of_all in product(PRECISIONS, PRECISIONS):
    cudnn.fp32_precision, backends.fp32_precision = of_cudnn, of_all
    check_block(True)
    check_block(False)
"""


def test_torchs_initial_settings() -> None:
    """In a process in which nobody has set anything: no setter brings those settings back."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", INITIAL], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_deterministic_callers_stay_so() -> None:
    cudnn.deterministic = True
    with block():
        pass
    assert cudnn.deterministic


def test_the_last_of_overlapping_blocks_restores() -> None:
    before = settings()
    first, second, third = block(), block(allow_tf32=True), block()
    for entered in (first, second, third):
        entered.__enter__()
        assert cudnn.conv.fp32_precision == "ieee"
    for left in (first, third):
        left.__exit__(None, None, None)
        assert cudnn.deterministic
        assert cudnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert settings() == before


def test_an_error_in_the_block_restores_too() -> None:
    before = settings()
    with pytest.raises(ValueError, match="within"), block():
        raise ValueError("within")
    assert settings() == before


def no_tf32() -> None:
    cudnn.allow_tf32 = False


def tf32() -> None:
    cudnn.allow_tf32 = True


def conv_tf32() -> None:
    cudnn.conv.fp32_precision = "tf32"


def conv_none() -> None:
    cudnn.conv.fp32_precision = "none"


def cudnn_tf32() -> None:
    cudnn.fp32_precision = "tf32"


def cudnn_none() -> None:
    cudnn.fp32_precision = "none"


def all_ieee() -> None:
    backends.fp32_precision = "ieee"


@pytest.mark.parametrize("change", [no_tf32, tf32, conv_tf32, conv_none, cudnn_tf32, cudnn_none, all_ieee])
@pytest.mark.parametrize("conv", PRECISIONS)
@pytest.mark.parametrize("of_cudnn", ["none", "tf32"])
def test_what_a_caller_changes_meanwhile_stays(change: Callable[[], None], conv: str, of_cudnn: str) -> None:
    put(True, conv, of_cudnn, "none")
    change()
    wanted = settings()
    put(True, conv, of_cudnn, "none")
    with block():
        change()
        with block():  # somebody else's: needs float32 all the same
            assert cudnn.conv.fp32_precision in ("ieee", "none")
    assert settings() == wanted


def test_convolutions_that_begin_to_inherit_meanwhile_stay_so() -> None:
    """They still read as what they were made to be, but have no setting of their own any more."""
    put(True, "tf32", "none", "none")
    with block():
        cudnn.conv.fp32_precision, backends.fp32_precision = "none", "ieee"
    assert cudnn.conv.fp32_precision == "ieee"
    backends.fp32_precision = "none"
    assert cudnn.conv.fp32_precision == "none"


def test_a_cpu_is_left_alone() -> None:
    before = settings()
    with conv_precision(torch.device("cpu"), allow_tf32=False):
        assert settings() == before
