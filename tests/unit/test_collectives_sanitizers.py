"""The native core under sanitizers: threads as ranks, and kernels over memory that ends where the data ends.

Builds ``csrc/tests/core_test.cpp`` with a sanitizer and runs it. Left out: the binding to Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
# One fault of each kind, so that a clean run of the core means something.
_FAULTS = """
#include <climits>
#include <string>
#include <thread>
int counter = 0;
int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "none";
  if (fault == "thread") {
    std::thread other([] { for (int i = 0; i < 1000; ++i) ++counter; });
    for (int i = 0; i < 1000; ++i) ++counter;
    other.join();
  }
  if (fault == "address") {
    volatile char* bytes = new char[16];
    bytes[15 + argc] = 1;
  }
  volatile int large = INT_MAX;
  if (fault == "undefined") large = large + argc;
}
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _build_with(sanitizer: str, folder: Path, *programs: str) -> None:
    """Build targets of the core with a sanitizer; skip where the machine cannot."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here: the core is not built with -fsanitize={sanitizer}")
    probe = folder / "probe.cpp"
    probe.write_text(_FAULTS)
    command = [
        "c++",
        "-std=c++20",
        "-g",
        f"-fsanitize={sanitizer}",
        str(probe),
        "-o",
        str(folder / "probe"),
        "-pthread",
    ]
    for step in (command, [str(folder / "probe")]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"-fsanitize={sanitizer} does not work here: {(done.stderr.splitlines() or ['no message'])[0]}")
    for fault in sanitizer.split(","):
        done = _run(folder / "probe", fault)
        assert _reports(done), f"the {fault} sanitizer does not see a fault"
    # Instrumented kernels take minutes to optimise, and unoptimised ones hide nothing from a sanitizer.
    compile_rule = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -w -o <OBJECT> -c <SOURCE>"
    configure = ["cmake", "-S", str(_ROOT), "-B", str(folder / "build"), f"-DCOFIRE_SANITIZE={sanitizer}"]
    configure.append(f"-DCMAKE_CXX_COMPILE_OBJECT={compile_rule}")
    build = ["cmake", "--build", str(folder / "build"), "--parallel", "2", "--target", *programs]
    for step in (configure, build):
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _reports(done: subprocess.CompletedProcess[str]) -> bool:
    said = done.stdout + done.stderr
    return "Sanitizer" in said or "runtime error" in said


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {
        "TSAN_OPTIONS": "halt_on_error=0:exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=1:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **options},
    )


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_core_runs_clean_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    _build_with(sanitizer, tmp_path, "core_test")
    done = _run(tmp_path / "build" / "core_test")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "core_test: all good" in done.stdout
    assert not _reports(done), said[-6000:]
