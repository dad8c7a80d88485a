"""The benchmarks still run: each explains itself, and the GPU's goes through all its rows on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "tests/benchmarks"
PROGRAMS = sorted(path.name for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text())
# In one process: most of them import the same libraries, which takes seconds.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for program in sys.argv[1:]:
    sys.argv, said, code = [program, "--help"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(program, run_name="__main__")
    except SystemExit as error:
        code = error.code
    found[program] = [code, said.getvalue()]
print(json.dumps(found))
"""


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command at the repository's root, as a person starts it."""
    known = {**os.environ, "PYTHONPATH": str(BENCHMARKS), **env}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=known, capture_output=True, text=True, timeout=300)


def test_every_program_explains_itself():
    assert len(PROGRAMS) >= 12
    done = run(sys.executable, "-c", HELP, *(BENCHMARKS / name for name in PROGRAMS))
    assert done.returncode == 0, done.stderr
    for program, (code, messages) in json.loads(done.stdout).items():
        assert code == 0 and "usage:" in messages, program


@pytest.mark.skipif(not (BENCHMARKS / "README.md").exists(), reason="tests/benchmarks has no README.md")
@pytest.mark.parametrize("program", [*PROGRAMS, "gpu.sh"])
def test_every_program_is_in_the_readme(program):
    assert f"`{program}`" in (BENCHMARKS / "README.md").read_text()


def test_the_gpus_rows_are_measured_on_a_cpu_too():
    """Tiny models, hardly any steps: what it prints is no figure, but no row and no check breaks."""
    flags = ("--device", "cpu", "--size", "tiny", "--row-seconds", 0.01, "--json")
    done = run(sys.executable, BENCHMARKS / "gpu.py", *flags)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert len(content["checks"]) == 5 and {line[:4] for line in content["checks"]} <= {"PASS", "SKIP"}
    assert len(content["rows"]) == 16
    for row in content["rows"]:
        assert row["ms"] > 0 and row["peak_gb"] > 0, row
        computes = "ranking" not in row["name"] and "loader alone" not in row["name"]
        assert (row["tflops"] is not None) == computes, row


def test_without_a_gpu_it_says_so():
    python = sys.executable
    assert run("bash", "-n", BENCHMARKS / "gpu.sh").returncode == 0
    done = run("bash", BENCHMARKS / "gpu.sh", PYTHON=python, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device" in done.stderr and python in done.stderr
    assert not done.stdout
