"""Who may import whom: the rooms stay rooms, and the light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = [
    "hubkit.hub",
    "hubkit.store",
    "hubkit.remotes",
    "hubkit.policy",
    "hubkit.index",
    "hubkit.index_check",
    "hubkit.catalogue",
    "hubkit.provenance.inspection",
    "hubkit.signing",
    "hubkit.mixture",
    "hubkit.cli",
]


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL = {name: path for package in ("hubkit", "compose", "serving") for name, path in modules(package).items()}


def imports(name: str, *, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a module imports, lazily or not; type-checking blocks do not count."""
    tree = ast.parse(ALL[name].read_text())
    found: set[str] = set()
    blocks = [tree.body] if top_level_only else [list(ast.walk(tree))]
    for node in (n for block in blocks for n in block):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide the layers"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(name: str, package: str) -> bool:
    return any(i == package or i.startswith(package + ".") for i in imports(name))


@pytest.mark.parametrize("name", sorted(ALL))
def test_arrows_go_down_only(name):
    if name != "hubkit.__main__" and not name.startswith("hubkit.cli"):
        if name.startswith("hubkit"):
            assert not reaches(name, "compose")
            assert not reaches(name, "serving")
        assert not reaches(name, "hubkit.cli")
    if name.startswith("compose"):
        assert not reaches(name, "serving")
    if name.startswith("serving"):
        assert not reaches(name, "compose")
    if name.startswith("hubkit.ops"):
        foreign = {i.split(".")[0] for i in imports(name)} - set(sys.stdlib_module_names) - {"torch", "triton"}
        assert foreign <= {"hubkit"}
        assert all(i.startswith(("hubkit.ops", "hubkit.errors")) for i in imports(name) if i.startswith("hubkit"))
    if name.startswith("hubkit.lean"):
        assert all(i.startswith(("hubkit.ops", "hubkit.lean")) for i in imports(name) if i.startswith("hubkit."))
    if name.startswith("hubkit.lora"):
        for upper in ("hubkit.lean", "hubkit.train", "hubkit.store", "hubkit.hub"):
            assert not reaches(name, upper)
    if name.startswith(("hubkit.store", "hubkit.remotes", "hubkit.policy")):
        assert not reaches(name, "torch")
        assert not reaches(name, "transformers")


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_torch(name):
    code = f"import {name}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["show", "nothing"],
        ["show", "plural"],
        ["search", "sentiment"],
        ["index", "validate"],
        ["pull", "index:nothing"],
    ],
)
def test_light_commands_load_no_torch(arguments, tmp_path):
    code = (
        "import sys; from hubkit.cli import main\n"
        f"sys.argv = ['hubkit', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"HUBKIT_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def _cpu_seconds(code: str) -> float:
    """The least CPU time of a few runs of `code` in a fresh interpreter: what it costs on a quiet machine."""
    probe = f"import os, sys\nsys.stdout = open(os.devnull, 'w')\ntry:\n  {code}\nexcept SystemExit: pass\n"
    probe += "t = os.times(); print(t.user + t.system, file=sys.stderr)"
    runs = [subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True) for _ in range(5)]
    return min(float(run.stderr.split()[-1]) for run in runs)


def test_help_is_instant():
    """--help costs under 150 ms of CPU beyond a bare interpreter that has imported typer, which takes 50 ms itself on a
    machine of which that is true."""
    ours = _cpu_seconds("sys.argv = ['hubkit', '--help']; from hubkit.cli import main; main()")
    typer = _cpu_seconds("import typer")
    assert ours - typer < max(0.150, 3 * typer)
