"""Each threat of tests/attacks, met by the command line: refused by its rule, in time, with nothing left behind."""

from __future__ import annotations

import pkgutil
import re
import time
from importlib import import_module
from pathlib import Path

import pytest

import tests.attacks
from hubkit.adapter import Adapter
from hubkit.errors import PolicyError
from hubkit.policy import RULES
from tests.cli import hubkit

ATTACKS = [module.name for module in pkgutil.iter_modules(tests.attacks.__path__)]
DOCS = Path(__file__).parents[1] / "docs" / "policy.md"
# what only copying can get wrong, so that reading the folder in place is no threat
COPIED = {"link_to_a_secret", "link_to_a_fake_cache"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", ATTACKS)
def test_is_refused(name, tmp_path, home):
    attack = import_module(f"tests.attacks.{name}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    command = attack.make(folder)
    before = kept(home)

    started = time.monotonic()
    run = hubkit(*(command or ["add", str(folder), "--name", "attack"]))
    assert time.monotonic() - started < 120  # a regex, a pipe or a terabyte would take for ever
    assert run.code == attack.EXIT, run.err
    lines = run.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"] + ["rule"] * bool(attack.RULE)
    if attack.RULE:
        assert lines[2] == f"rule: {attack.RULE} (docs/policy.md)"
    assert all(line.isprintable() for line in lines)
    assert run.out == ""
    assert kept(home) == before
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - COPIED))
def test_is_refused_by_the_loader_too(name, tmp_path, home):
    attack = import_module(f"tests.attacks.{name}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    if attack.make(folder) is None:
        with pytest.raises(PolicyError) as caught:
            Adapter.load(folder)
        # a device behind a link is met as what it is
        assert caught.value.rule == ("file-type" if attack.RULE == "link" else attack.RULE)


def kept(home: Path) -> list[str]:
    """What is in a store but for its locks, with what is left in tmp/."""
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    return [file for file in files if not file.startswith("locks/") and file != "format.json"]


def test_every_rule_is_documented_once_and_has_its_test():
    documented = re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(RULES)
    assert all(re.match(rf"\| `{rule}` \|.*\| 5 \|$", line) for rule, line in rows().items())
    shown = {import_module(f"tests.attacks.{name}").RULE for name in ATTACKS}
    elsewhere = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for rule in set(RULES) - shown:
        assert f'"{rule}"' in elsewhere, f"no test breaks the rule {rule}"


def rows() -> dict[str, str]:
    """The lines of the table of rules, by rule."""
    lines = DOCS.read_text().splitlines()
    return {match[1]: line for line in lines if (match := re.match(r"\| `([a-z-]+)` \|", line))}


def test_every_refusal_in_the_code_is_by_one_of_the_rules():
    code = Path(__file__).parents[1] / "hubkit"
    named = set()
    for path in code.rglob("*.py"):
        text = path.read_text()
        named |= set(re.findall(r'\brefusal\(\s*"([a-z-]+)"', text))
        for call in re.findall(r"\bPolicyError\((.*?)\)(?: from|\n)", text, re.DOTALL):
            named |= set(re.findall(r'"([a-z]+(?:-[a-z]+)*)"\s*,?\s*$', call.strip()))
    assert named <= set(RULES)
