"""Ahead-of-time compilation of this package's kernels: what they become for a Hopper GPU, without one.

Each module of kernels has ``variants()``: the kernels with the types, constants and options that its functions start
them with. :func:`all_variants` gathers them, :func:`compile_ahead` assembles one and reads registers, stack and machine
code back with the tools that come with Triton.

    python -m cofire.precision.triton.compile [PART OF A NAME]
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cofire.errors import PrecisionError

# Compute capability 9.0; Triton assembles for sm_90a.
HOPPER = 90
_MODULES = ("quantize", "logfmt", "gemm")


@dataclass(frozen=True)
class Variant:
    """A kernel as it is started.

    Attributes:
        name: Of its own.
        kernel: A ``triton.jit`` function.
        signature: Types of the arguments that are no constants, such as ``*bf16``, ``i32`` and ``fp32``.
        constants: Values of the others.
        options: ``num_warps``, ``num_stages`` and the like.
        unaligned: Arguments that are not multiples of 16, as all other pointers and integers are.
        instructions: What the machine code must contain.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What a variant became.

    Attributes:
        ptx: Text.
        sass: Machine code, text.
        num_registers: Of a thread.
        stack_bytes: Of a thread; more than 0 where registers did not suffice.
        shared_bytes: Of a block.
    """

    ptx: str
    sass: str
    num_registers: int
    stack_bytes: int
    shared_bytes: int

    def count(self, instruction: str) -> int:
        """Return how many instructions of the machine code begin with a name."""
        return len(re.findall(rf"^\s+/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+ )?{re.escape(instruction)}", self.sass, re.M))


def all_variants() -> list[Variant]:
    """Return the variants of all modules."""
    found: list[Variant] = []
    for name in _MODULES:
        module = f"{__package__}.{name}"
        if importlib.util.find_spec(module) is not None:
            found += importlib.import_module(module).variants()
    return found


def compile_ahead(variant: Variant, capability: int = HOPPER) -> Compiled:
    """Compile and assemble a variant; needs no GPU.

    Raises:
        PrecisionError: Arguments are missing or unknown, or Triton interprets.
    """
    kernel = variant.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise PrecisionError(f"{variant.name} is interpreted; unset TRITON_INTERPRET to compile it")
    known = variant.signature.keys() | variant.constants.keys()
    if wrong := known ^ set(kernel.arg_names):
        raise PrecisionError(
            f"{variant.name}: arguments {sorted(wrong)} are missing or unknown; name each of them once"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or kind in ("i32", "i64")) and name not in variant.unaligned
    }
    source = ASTSource(kernel, signature, dict(variant.constants), aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return _inspect(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _inspect(ptx: str, cubin: bytes, shared_bytes: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", file)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return Compiled(ptx, sass, registers, stack, shared_bytes)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print registers, stack, shared memory and instructions of the variants whose name contains the argument."""
    print("| kernel | registers | stack bytes | shared bytes | instructions |\n|---|---|---|---|---|")
    for variant in all_variants():
        if len(sys.argv) < 2 or sys.argv[1] in variant.name:
            found = compile_ahead(variant)
            print(
                f"| {variant.name} | {found.num_registers} | {found.stack_bytes} | {found.shared_bytes} "
                f"| {found.count('')} |"
            )


if __name__ == "__main__":
    main()
