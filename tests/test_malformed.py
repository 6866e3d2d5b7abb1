"""Malformed and mutated weights: refused by rule, quickly and in little memory, and nothing gets through."""

from __future__ import annotations

import contextlib
import json
import random
import re
import struct
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hubkit.adapter import Adapter
from hubkit.errors import PolicyError
from hubkit.policy import check_adapter_folder
from hubkit.tensorfile import MAX_TENSORS
from tests.malformed import CONFIG, GOOD, MALFORMED, dump, is_whole, tensor, weights

MEGABYTE = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def verdict(folder: Path, data: bytes) -> str:
    """The rule that refuses these weights, or `accepted`."""
    (folder / "adapter_model.safetensors").write_bytes(data)
    try:
        check_adapter_folder(folder)
    except PolicyError as error:
        return error.rule
    return "accepted"


def test_the_corpus_is_of_many_kinds():
    assert len(MALFORMED) >= 100


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_by_its_rule(folder, name):
    rule, data = MALFORMED[name]
    tracemalloc.start()
    try:
        assert verdict(folder, data) == rule
        assert tracemalloc.get_traced_memory()[1] < 64 * MEGABYTE
    finally:
        tracemalloc.stop()
    with pytest.raises(PolicyError) as caught:
        Adapter.load(folder)
    assert caught.value.rule == rule
    assert least_seconds(folder, data, 0.05) < 0.05


def of_many(count: int) -> dict[str, dict]:
    """The header of a LoRA over experts: so many tensors of 16 bytes."""
    names = (f"base_model.model.layers.0.experts.{i // 2}.up_proj.lora_{'AB'[i % 2]}.weight" for i in range(count))
    return {name: tensor(16 * i) for i, name in enumerate(names)}


@pytest.mark.parametrize("extra", [{}, {"__metadata__": {"format": "pt"}}, {"\\u005f_metadata__": {}}])
def test_as_many_tensors_as_there_may_be(folder, extra):
    """One more is refused before the header is parsed, whatever else is in it."""

    def written(count: int) -> bytes:
        header = dump(of_many(count) | extra).replace(b"\\\\", b"\\")
        return weights(header, 16 * count)

    assert verdict(folder, written(MAX_TENSORS)) == "accepted"
    assert verdict(folder, written(MAX_TENSORS + 2)) == "tensor-count"


def test_a_fault_in_the_last_of_very_many_tensors_is_found(folder):
    data = bytearray(weights(of_many(MAX_TENSORS), 16 * MAX_TENSORS))
    data[-4:] = struct.pack("<f", float("nan"))
    (folder / "adapter_model.safetensors").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(PolicyError, match=r"experts\.2047\.up_proj\.lora_B") as caught:
            check_adapter_folder(folder)
        assert caught.value.rule == "finite"
        assert tracemalloc.get_traced_memory()[1] < 64 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert least_seconds(folder, bytes(data), 0.05) < 0.05


@pytest.mark.parametrize("name", GOOD)
def test_a_whole_file_is_accepted(folder, name):
    assert verdict(folder, GOOD[name]) == "accepted"
    assert is_whole(GOOD[name])
    assert_loads_as_safetensors_does(folder, GOOD[name])


@pytest.mark.parametrize("name", sorted(name for name in MALFORMED if MALFORMED[name][0] in ("finite", "offsets")))
def test_the_naive_opinion_can_tell(name):
    """A checker that accepts everything would prove nothing."""
    with contextlib.suppress(ValueError, IndexError, TypeError):
        assert not is_whole(MALFORMED[name][1])


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutations_get_through_only_whole(folder, count):
    """Whatever becomes of a file, it is refused by a rule or whole in the naive opinion, and then it loads."""
    choose = random.Random(count)
    seeds = [*GOOD.values(), *(data for _, data in MALFORMED.values() if len(data) < 4096)]
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        data = mutate(choose.choice(seeds), choose)
        outcome = verdict(folder, data)
        outcomes[outcome] += 1
        if outcome == "accepted":
            assert is_whole(data)
            assert_loads_as_safetensors_does(folder, data)
    assert len(outcomes) > 10
    assert 0 < outcomes["accepted"] < count / 2
    print(dict(outcomes))


@pytest.mark.slow
def test_no_mutation_costs_more_than_50_ms_or_64_mb(folder):
    choose = random.Random(3)
    many = [MALFORMED[name][1] for name in ("tensors-4097", "tensors-90000")]
    seeds = [*GOOD.values(), *(data for _, data in MALFORMED.values()), *many * 3]
    slowest, largest = 0.0, 0
    for number in range(4000):
        data = mutate(choose.choice(seeds), choose)
        if number % 4 == 0:
            tracemalloc.start()
            verdict(folder, data)
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            slowest = max(slowest, least_seconds(folder, data, 0.05))
    print(f"slowest {1000 * slowest:.1f} ms, largest {largest / MEGABYTE:.1f} MiB")
    assert slowest < 0.05
    assert largest < 64 * MEGABYTE


def least_seconds(folder: Path, data: bytes, enough: float) -> float:
    """What checking costs: the least of ten tries, which others on this machine disturb, or the first that will do;
    on a slow machine, what it would cost on one that is none."""
    tries: list[float] = []
    while len(tries) < 10 and (not tries or tries[-1] >= enough):
        time.sleep(0.2 if tries else 0)
        tries.append(cpu_seconds(folder, data))
        if tries[-1] >= enough:
            tries[-1] /= slowness()
    return min(tries)


def slowness() -> float:
    """By how much this machine is slower now than one on which json reads the longest header in 25 ms; at least 1."""
    header = dump(of_many(MAX_TENSORS))
    started = time.thread_time()
    json.loads(header)
    return max(1.0, (time.thread_time() - started) / 0.025)


def cpu_seconds(folder: Path, data: bytes) -> float:
    (folder / "adapter_model.safetensors").write_bytes(data)
    started = time.thread_time()
    with contextlib.suppress(PolicyError):
        check_adapter_folder(folder)
    return time.thread_time() - started


def assert_loads_as_safetensors_does(folder: Path, data: bytes) -> None:
    ours, theirs = Adapter.load(folder).tensors(), load(data)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"0",
    b"1e9",
    b"NaN",
    b"null",
    b"true",
    b"\\u0000",
    b" ",
    b"\xff",
]
NAMES = [
    "base_model.model.layers.0.q_proj.lora_A.weight",
    "base_model.model.layers.0.q_proj.lora_B.weight",
    "base_model.model.layers.0.k_proj.lora_A.weight",
    "base_model.model.layers.0.k_proj.lora_B.weight",
    "base_model.model.layers.0.q_proj.lora_embedding_A",
    "base_model.model.layers.0.q_proj.lora_B.bias",
    "base_model.model.norm.weight",
    "__metadata__",
    "lora_A.weight",
    "../x",
]
NUMBERS = [0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 255, 1 << 31, 1 << 32, (1 << 48) - 1, 1 << 48, 1 << 63, 1 << 64]


def mutate(data: bytes, choose: random.Random) -> bytes:
    """The file after one to three changes, to its header as JSON or to its bytes."""
    if choose.random() < 0.5:
        try:
            return _mutate_json(data, choose)
        except (ValueError, AttributeError, TypeError, IndexError, KeyError, RecursionError):
            pass  # a seed whose header is no JSON of the kind
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        _change_bytes(changed, choose)
    if choose.random() < 0.7 and b"}" in changed[8:]:
        changed[:8] = (changed.rindex(b"}") + 1 - 8).to_bytes(8, "little")
    return bytes(changed)


def _mutate_json(data: bytes, choose: random.Random) -> bytes:
    """Names, dtypes, shapes and offsets exchanged for others, the data mostly kept as long as it was."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(choose.choice([1, 1, 2, 3])):
        name = choose.choice(list(header))
        kind = choose.randrange(7)
        if kind == 0:
            header[choose.choice(NAMES)] = header.pop(name)
        elif kind == 1:
            header[name]["dtype"] = choose.choice(["F32", "F16", "BF16", "F64", "I8", None])
        elif kind == 2:
            header[name]["shape"] = [choose.choice(NUMBERS) for _ in range(choose.randrange(4))]
        elif kind == 3:
            header[name]["data_offsets"][choose.randrange(2)] = choose.choice(NUMBERS)
        elif kind == 4:
            other = choose.choice(list(header))
            header[name]["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"],
                header[name]["data_offsets"],
            )
        elif kind == 5:
            header[choose.choice(NAMES)] = json.loads(json.dumps(header[name]))
        else:
            body = choose.randbytes(max(0, len(body) + choose.choice([0, 0, 0, 16, 1, -1, -16])))
    raw = json.dumps(header).encode() + b" " * choose.choice([0, 0, 1, 8])
    return len(raw).to_bytes(8, "little") + raw + body


def _change_bytes(data: bytearray, choose: random.Random) -> None:
    """One change in place: a bit, a token, a number, a piece again or gone, or the rest gone."""
    if len(data) < 10:
        data += choose.randbytes(10)
    kind, at = choose.randrange(6), choose.randrange(8, len(data))
    if kind == 0:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == 1:
        data[at : at + choose.randint(0, 2)] = choose.choice(TOKENS)
    elif kind == 2 and (numbers := list(re.finditer(rb"\d+", data[8:]))):
        number = choose.choice(numbers)
        data[8 + number.start() : 8 + number.end()] = str(choose.choice(NUMBERS)).encode()
    elif kind == 3:
        data[at:at] = data[at : at + choose.randint(1, 80)]
    elif kind == 4:
        del data[at : at + choose.randint(1, 20)]
    else:
        del data[at:]
