"""Every kernel that the plan table can launch, compiled ahead of time: needs no GPU, shows what the compiler made.

    python -m hubkit.ops.gpu.aot [--target sm90 ...] [--training N] [--format human|json]

What is compiled is what `launch.py` launches: the launches of a problem of each rule are recorded on tensors
without data, and their arguments specialised as Triton's launcher would.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hubkit.ops.autograd import Wanted
from hubkit.ops.dropout import Dropout
from hubkit.ops.gpu import factors, gradients, kernels, routes, training
from hubkit.ops.gpu.launch import MODES, Call
from hubkit.ops.gpu.plans import TilePlan, rules

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm80": 163 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a program may have
MATRIX = {
    "cuda": re.compile(r"\b(UTC[HQ]MMA|[HQ]GMMA|HMMA|IMMA|DMMA)\b"),
    "hip": re.compile(r"\b(v_mfma)_"),
}
MODULES = (kernels, gradients, routes, factors)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True)
class Launch:
    """One kernel with all that Triton specialises it on."""

    kernel: str
    plan: TilePlan = field(compare=False)  # of the first rule that launches this
    itemsize: int = field(compare=False)
    members: int = field(compare=False)
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[int, ...], ...]  # paths of arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch. registers per thread, shared bytes per program, spilled: bytes of local
    memory a thread (spilled registers on AMD); height: rows of its products; matrix: the matrix instruction, if any."""

    target: str
    kernel: str
    mode: str
    itemsize: int
    members: int
    tile: int
    BN: int
    BK: int
    warps: int
    registers: int
    shared: int
    spilled: int
    height: int
    matrix: str


def launches(target: str, training: int | None = None) -> list[Launch]:
    """All distinct launches for the target, over the rules of the table that name it or name none; of rules for
    training no more than `training` of each kernel that other rules do not launch."""
    found: dict[Launch, None] = {}
    trained: dict[Launch, None] = {}
    for rule in rules():
        wanted = rule["if"].get("arch", target)
        if target not in (wanted if isinstance(wanted, list) else [wanted]):
            continue
        for itemsize in DTYPES if "itemsize" not in rule["if"] else [rule["if"]["itemsize"]]:
            (trained if rule["if"].get("training") else found).update(dict.fromkeys(recorded(rule, target, itemsize)))
    own = [launch for launch in trained if launch not in found]
    kernels_of = dict.fromkeys(launch.kernel for launch in own)
    return [*found, *(each for name in kernels_of for each in [x for x in own if x.kernel == name][:training])]


def build(launch: Launch, target: str) -> Built:
    """Compile down to machine code and read its resources."""
    function = _kernel(launch.kernel)
    attrs = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attrs)
    made = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    registers, spilled, code = _hip(made) if TARGETS[target].backend == "hip" else _cuda(made)
    instructions = MATRIX[TARGETS[target].backend].findall(code)
    plan = launch.plan
    height = dict(launch.constants)["BR"] if launch.kernel == "factor_kernel" else plan.tile  # Sᵀ z has arena rows
    return Built(
        target, launch.kernel, plan.mode, launch.itemsize, launch.members, plan.tile, plan.BN, plan.BK,
        dict(launch.options)["num_warps"], registers, made.metadata.shared, spilled, height,
        max(set(instructions), key=instructions.count) if instructions else "",
    )  # fmt: skip


def recorded(rule: dict[str, Any], target: str, itemsize: int) -> Iterator[Launch]:
    """What is launched for a problem of the rule: linears that share their input where it is for few rows, or for
    training."""
    plan, dtype, training_rule = rule["plan"], DTYPES[itemsize], rule["if"].get("training", False)
    limits = {name: rule["if"].get(name, {}).get("most", 1 << 30) for name in ("M", "ranks")}
    M, ranks, K = min(1024, limits["M"]), min(max(64, plan.factor_BR), limits["ranks"]), 4096
    Ns = (4096, 1024, 1024) if limits["M"] <= 64 or training_rule else (4096,)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with _Recorder() as recorder:
        routed = routes.Route(torch.ones(1, ranks), torch.zeros(M, dtype=torch.long), torch.device("meta"))
        arenas = tuple(empty(ranks, K) for _ in Ns), tuple(empty(ranks, N) for N in Ns)
        weights = [(empty(N, K), None) for N in Ns]
        chained = target in ("sm90", "sm100")
        if not training_rule:
            MODES[plan.mode](Call(empty(M, K), weights, *arenas, routed, plan, chained))
        if plan.mode == "separate":
            _train(Call(empty(M, K), weights, *arenas, routed, plan, chained))
            _train(Call(empty(M, K), weights, *arenas, routed, plan, chained, dropout=Dropout(0.1, 1 << 40)))
        places = torch.empty(20, dtype=torch.int32, device="meta")
        factors.compose_factors(arenas[0][0], places, torch.empty(20, 20, device="meta"), places, 16)
    for kernel, kwargs in recorder.launched:
        yield _specialised(kernel, kwargs, plan, itemsize, len(Ns))


def _train(call: Call) -> None:
    Ys, S = training.forward(call)
    training.backward(call, Ys, S, Wanted(x=True, C=True, A=True, Bt=True))


def _kernel(name: str) -> Any:
    return next(vars(module)[name] for module in MODULES if name in vars(module))


class _Recorder:
    """Stands in for the kernels and notes what they are launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, dict[str, Any]]] = []

    def __enter__(self) -> _Recorder:
        self._own = [(m, n, k) for m in MODULES for n, k in vars(m).items() if n.endswith("_kernel")]
        for module, name, kernel in self._own:
            setattr(module, name, _Noted(self, name, kernel))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, kernel in self._own:
            setattr(module, name, kernel)


class _Noted:
    def __init__(self, recorder: _Recorder, name: str, kernel: Any) -> None:
        self.recorder, self.name, self.kernel = recorder, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def note(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.recorder.launched.append((self.name, {**named, **kwargs}))

        return note


def _specialised(kernel: str, kwargs: dict[str, Any], plan: TilePlan, itemsize: int, members: int) -> Launch:
    function = _kernel(kernel)
    constexpr = {p.name for p in function.params if p.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for index, name in enumerate(function.arg_names):
        value = kwargs.pop(name)
        if name in constexpr or (value == 1 if isinstance(value, int) else False):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(_type(item) for item in value)
            aligned += [(index, place) for place, item in enumerate(value) if _aligned(item)]
        else:
            signature[name] = _type(value)
            aligned += [(index,)] if _aligned(value) else []
    parts = (tuple(part.items()) for part in (signature, constants, kwargs))
    signed, constant, options = parts
    return Launch(kernel, plan, itemsize, members, signed, constant, tuple(aligned), options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    return "fp32" if isinstance(value, float) else "i64" if value >= 1 << 31 else "i32"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _cuda(made: Any) -> tuple[int, int, str]:
    from tempfile import NamedTemporaryFile

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "cuobjdump", "--dump-sass", file.name)
    local = int(re.search(r"\bLOCAL:(\d+)", usage)[1]) + int(re.search(r"\bSTACK:(\d+)", usage)[1])  # type: ignore[index]
    if not re.search(r"\b(LDL|STL)\b", code):
        local = 0  # a stack frame that nothing is loaded from or stored to
    return int(re.search(r"\bREG:(\d+)", usage)[1]), local, code  # type: ignore[index]


def _hip(made: Any) -> tuple[int, int, str]:
    code = made.asm["amdgcn"]
    count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"], code


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated (default: all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--training", type=int, metavar="N", help="of rules for training, N launches of each kernel")
    options = parser.parse_args()
    work = [(launch, target) for target in options.target or TARGETS for launch in launches(target, options.training)]
    with ProcessPoolExecutor(options.jobs) as pool:
        built = [asdict(row) for row in pool.map(build, *zip(*work, strict=True))]
    if options.format == "json":
        print(json.dumps({"built": built, "shared_limit": SHARED_LIMIT}))
        return
    print("  ".join(built[0]))
    for row in built:
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()))


if __name__ == "__main__":
    main()
