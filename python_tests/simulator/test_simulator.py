"""The Hopper simulator's own tests (csrc/sim/tests), and the machine code that the instruction wrappers become."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from built_once import CSRC, linked, run
from machine_code import compile_kernels

TESTS = CSRC / "sim" / "tests"


def names_of_tests() -> list[str]:
    sources = sorted(TESTS.glob("test_*.cpp"))
    return [name for source in sources for name in re.findall(r"SIM_TEST\((\w+)\)", source.read_text())]


@pytest.fixture(scope="session")
def simulator_tests() -> Path:
    """The test program, built from the simulator and its tests."""
    return linked("simulator_tests", sorted(TESTS.glob("*.cpp")))


@pytest.mark.parametrize("name", names_of_tests())
def test_simulator(simulator_tests: Path, name: str) -> None:
    assert f"{name}: ok" in run([simulator_tests, name])


def test_all_simulator_tests_are_run(simulator_tests: Path) -> None:
    assert sorted(run([simulator_tests, "--list"]).split()) == sorted(names_of_tests())


def test_tensor_core_agrees_with_canonical_layouts(simulator_tests: Path) -> None:
    out = run([simulator_tests, "--layouts", TESTS / "canonical_layouts.txt"])
    assert out == f"{len((TESTS / 'canonical_layouts.txt').read_text().splitlines())} layouts agree\n"


def test_layout_check_can_fail(simulator_tests: Path, tmp_path: Path) -> None:
    lines = (TESTS / "canonical_layouts.txt").read_text().splitlines()
    wrong = tmp_path / "wrong.txt"
    for line in (lines[3], lines[-1]):
        wrong.write_text(line[:-1] + str((int(line[-1]) + 1) % 10) + "\n")
        result = subprocess.run([simulator_tests, "--layouts", wrong], capture_output=True, text=True)
        assert result.returncode == 1
        assert "elsewhere" in result.stdout or "other elements" in result.stdout


# What each wrapper must become: the instruction as the disassembler prints it, and how often at least.
MACHINE_CODE = {
    "wgmma_bf16": r"HGMMA\.64x(64|96|128|256)x16\.F32\.BF16 ",
    "wgmma_fence": r"WARPGROUP\.ARRIVE",
    "wgmma_wait": r"WARPGROUP\.DEPBAR",
    "tma_load 2-D": r"UTMALDG\.2D ",
    "tma_load 3-D": r"UTMALDG\.3D ",
    "tma_load 4-D": r"UTMALDG\.4D ",
    "tma_load 5-D": r"UTMALDG\.5D ",
    "tma_load_multicast": r"UTMALDG\.2D\.MULTICAST ",
    "tma_store 2-D": r"UTMASTG\.2D ",
    "tma_store 5-D": r"UTMASTG\.5D ",
    "tma_store_commit": r"UTMACMDFLUSH",
    "tma_prefetch_map": r"UTMACCTL\.PF ",
    "mbarrier_init": r"SYNCS\.EXCH\.64 ",
    "mbarrier_arrive": r"SYNCS\.ARRIVE\.TRANS64",
    "mbarrier_wait": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT ",
    "fence_proxy_async": r"FENCE\.VIEW\.ASYNC",
    "named_barrier_sync": r"BAR\.SYNC",
    "cluster_arrive_relaxed": r"UCGABAR_ARV",
    "cluster_wait": r"UCGABAR_WAIT",
    "elect_one": r"ELECT ",
    "registers_release": r"USETMAXREG\.DEALLOC",
    "registers_claim": r"USETMAXREG\.TRY_ALLOC",
    "stmatrix_x4": r"STSM\.16\.M88\.4 ",
    "stmatrix_x4 transposed": r"STSM\.16\.MT88\.4 ",
    "ldmatrix_x4": r"LDSM\.16\.M88\.4 ",
    "ldmatrix_x4 transposed": r"LDSM\.16\.MT88\.4 ",
    "fast_exp2": r"MUFU\.EX2 ",
    "pack_bf16x2": r"F2FP\.BF16\.F32\.PACK_AB ",
}


@pytest.fixture(scope="session")
def machine_code() -> str:
    """Disassembly of the sample kernels, compiled without a spill or a warning."""
    return compile_kernels([TESTS / "machine_code.cu"])["machine_code"].code


@pytest.mark.parametrize("wrapper", MACHINE_CODE)
def test_wrapper_becomes_its_instruction(machine_code: str, wrapper: str) -> None:
    assert re.search(MACHINE_CODE[wrapper], machine_code), f"{wrapper}: no {MACHINE_CODE[wrapper]}"


def test_no_local_memory(machine_code: str) -> None:
    assert not re.search(r"\b(LDL|STL)\b", machine_code)


def test_nothing_waits_for_all_of_memory(machine_code: str) -> None:
    # A membar on the way to a peer's barrier would stall the consumer in every stage.
    assert "SYNCS.ARRIVE.TRANS64.RED" in machine_code
    assert not re.search(r"MEMBAR\.\w+\.(?!CTA)", machine_code)
