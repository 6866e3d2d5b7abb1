"""Training against peft as the oracle, and what a run promises: determinism, resuming, early stop, a clean
model."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.adapter import Adapter
from hubkit.base import Base, Fingerprint
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, UsageError
from hubkit.prompt import Template
from hubkit.task import Example
from hubkit.train import Recipe, train
from hubkit.train.checkpoint import FILE
from hubkit.train.data import Plan, encode_all, split
from hubkit.train.recipe import ALL_LINEAR
from hubkit.train.sites import siblings, targeted
from hubkit.train.trainer import Run, frozen, resolved
from tests import tiny_bases

EXAMPLES = [Example("abcdefghij"[: 2 + i % 8] + str(i), "xyz"[i % 3] * (1 + i % 4)) for i in range(24)]
QUICK = Recipe(rank=3, alpha=5.0, steps=20, batch=6, lr=5e-3, targets=ALL_LINEAR, dtype="float32")


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Base:
    model = getattr(tiny_bases, kind)().to(dtype).requires_grad_(False)
    print_ = Fingerprint("sha256:" + "a" * 64, None)
    return Base("tiny", Path(), model, tiny_bases.tokenizer(), print_, seq2seq=kind == "t5", reference="tiny")


def start(base: Base, recipe: Recipe) -> Run:
    recipe = resolved(base, recipe, None)
    assert recipe.template is not None
    return Run(base, recipe, encode_all(EXAMPLES, recipe.template, base.tokenizer, recipe.max_length))


def peft_twin(run: Run, kind: str) -> Any:
    """The same model and adapter states under peft."""
    from peft import LoraConfig, get_peft_model

    recipe = run.recipe
    targets = "all-linear" if recipe.targets == ALL_LINEAR else list(recipe.targets)
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=targets,
        use_rslora=recipe.rslora,
        task_type=task,
    )
    twin = get_peft_model(tiny(kind).model, config)
    parameters = dict(twin.named_parameters())
    branches = run.method.branches(torch.float32)
    assert 2 * len(branches) == sum(p.requires_grad for p in parameters.values())
    with torch.no_grad():
        for path, branch in branches.items():
            parameters[f"base_model.model.{path}.lora_A.default.weight"].copy_(branch.A)
            parameters[f"base_model.model.{path}.lora_B.default.weight"].copy_(branch.B)
    return twin.eval()


def full_loss(model: Any, run: Run, indices: list[int]) -> torch.Tensor:
    """Mean over target tokens as transformers computes it: logits everywhere, a padding mask, -100
    elsewhere."""
    chosen = [run.examples[i] for i in indices]
    width = max(len(e.prompt) + len(e.target) for e in chosen)
    if run.base.seq2seq:
        labels = [[*e.target, *[-100] * (width - len(e.target))] for e in chosen]
        ids = [[*e.prompt, *[0] * (width - len(e.prompt))] for e in chosen]
        mask = [[1] * len(e.prompt) + [0] * (width - len(e.prompt)) for e in chosen]
    else:
        spare = [width - len(e.prompt) - len(e.target) for e in chosen]
        labels = [[-100] * len(e.prompt) + [*e.target] + [-100] * s for e, s in zip(chosen, spare, strict=True)]
        ids = [[*e.prompt, *e.target, *[0] * s] for e, s in zip(chosen, spare, strict=True)]
        mask = [[1] * (width - s) + [0] * s for s in spare]
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
    return model(**inputs).loss


CASES = {
    "llama-all": ("llama", QUICK),
    "llama-qv": ("llama", replace(QUICK, targets=("q_proj", "v_proj"))),
    "llama-last": ("llama", replace(QUICK, targets=("layers.1.mlp.down_proj",))),
    "llama-rslora": ("llama", replace(QUICK, targets=("self_attn.o_proj", "up_proj"), rslora=True)),
    "t5-qv": ("t5", replace(QUICK, targets=("q", "v"))),
    "t5-all": ("t5", QUICK),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_one_step_equal_pefts(case: str) -> None:
    kind, recipe = CASES[case]
    run = start(tiny(kind), recipe)
    with torch.no_grad():
        run.method.states += 0.1 * torch.randn(run.method.states.shape, generator=torch.Generator().manual_seed(3))
    twin = peft_twin(run, kind)
    indices = run.plan.step(0)
    full_loss(twin, run, indices).backward()
    captured = {}
    run.update = lambda number: captured.update(gradient=run.method.states.grad.clone())  # type: ignore[method-assign]
    with frozen(run.base.model):
        run.step(0)
    with torch.no_grad():
        run.method.states.copy_(captured["gradient"])  # so that branches() names the parts of the gradient
    for path, gradient in run.method.branches(torch.float32).items():
        module = twin.get_submodule(f"base_model.model.{path}")
        for ours, layer in ((gradient.A, module.lora_A), (gradient.B, module.lora_B)):
            theirs = layer["default"].weight.grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("case", ["llama-all", "llama-rslora", "t5-qv"])
def test_twenty_steps_have_the_losses_of_a_peft_loop(case: str) -> None:
    kind, recipe = CASES[case]
    run = start(tiny(kind), recipe)
    twin = peft_twin(run, kind)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay)
    theirs = []
    for number in range(recipe.steps):
        loss = full_loss(twin, run, run.plan.step(number))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.param_groups[0]["lr"] = recipe.rate(number)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    ours = train(tiny(kind), [EXAMPLES], recipe).curve
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < 0.8 * ours[0]


def test_two_runs_with_a_seed_are_bit_equal_and_another_seed_differs() -> None:
    recipe = replace(QUICK, dropout=0.2)
    first, second, other = (train(tiny(), [EXAMPLES], recipe, seed=seed) for seed in (1, 1, 2))
    assert first.curve == second.curve
    assert first.curve != other.curve
    for path, branch in first.adapter.branches.items():
        assert torch.equal(branch.A, second.adapter.branches[path].A)
        assert torch.equal(branch.B, second.adapter.branches[path].B)


def test_dropout_acts_in_training_steps_only() -> None:
    plain, dropped = (start(tiny(), replace(QUICK, dropout=share, validation=0.2)) for share in (0.0, 0.5))
    for run in (plain, dropped):
        with torch.no_grad():
            run.method.states += 0.1
        run.look()
    assert plain.history.validation == dropped.history.validation
    assert plain.step(0) != dropped.step(0)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accumulation_equals_the_batch_at_once(kind: str) -> None:
    whole, pieces = (train(tiny(kind), [EXAMPLES], replace(QUICK, accumulation=n)).curve for n in (1, 4))
    assert whole == pytest.approx(pieces, rel=1e-3)


def test_several_files_are_mixed() -> None:
    parts, joined = (train(tiny(), data, QUICK) for data in ([EXAMPLES[:9], EXAMPLES[9:]], [EXAMPLES]))
    assert parts.curve == joined.curve
    assert parts.examples == len(EXAMPLES)
    assert parts.left_out == 0
    short = train(tiny(), [EXAMPLES], replace(QUICK, steps=1, max_length=22))
    assert 0 < short.left_out == len(EXAMPLES) - short.examples


def test_early_stop_keeps_the_best_states() -> None:
    recipe = replace(QUICK, steps=200, lr=0.05, validation=0.3, evaluate_every=5, schedule="constant", clip=10.0)
    run = start(tiny(), recipe)
    with frozen(run.base.model):
        run.loop(None, None)
    result = run.result()
    losses = dict(result.validation)
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.steps == result.best_step + recipe.patience * recipe.evaluate_every < recipe.steps
    with frozen(run.base.model):
        run.look()
    assert run.history.validation[-1][1] == losses[result.best_step]


LONG = replace(QUICK, steps=100, validation=0.2, evaluate_every=20, patience=100, dropout=0.1)
KILLED = """
import sys, torch
from pathlib import Path
from tests.test_train import EXAMPLES, LONG, tiny
from hubkit.train import train
torch.set_num_threads(1)
def progress(now):
    print(now.step, flush=True)
    if now.step == 60:
        sys.stdin.readline()  # for ever: whoever is to kill it may be late
train(tiny(), [EXAMPLES], LONG, workdir=Path(sys.argv[1]), progress=progress)
"""


def test_a_run_killed_with_sigkill_resumes_to_bit_equal_losses(tmp_path: Path) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    for line in victim.stdout:
        if int(line) >= 40:
            victim.send_signal(signal.SIGKILL)
            break
    assert victim.wait(300) == -signal.SIGKILL, victim.stderr and victim.stderr.read()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps: list[int] = []
        resumed = train(tiny(), [EXAMPLES], LONG, workdir=tmp_path, progress=lambda now: steps.append(now.step))
        whole = train(tiny(), [EXAMPLES], LONG)
    finally:
        torch.set_num_threads(threads)
    assert 25 < steps[0] < LONG.steps
    assert resumed.curve == whole.curve
    assert resumed.validation == whole.validation
    for path, branch in resumed.adapter.branches.items():
        assert torch.equal(branch.B, whole.adapter.branches[path].B)


def test_a_complete_run_gives_its_result_again_and_can_be_started_over(tmp_path: Path) -> None:
    first = train(tiny(), [EXAMPLES], QUICK, workdir=tmp_path)
    ticks: list[int] = []
    again = train(tiny(), [EXAMPLES], QUICK, workdir=tmp_path, progress=lambda now: ticks.append(now.step))
    assert not ticks
    assert again.curve == first.curve
    train(tiny(), [EXAMPLES], QUICK, workdir=tmp_path, resume=False, progress=lambda now: ticks.append(now.step))
    assert len(ticks) == QUICK.steps


def test_checkpoints_of_other_runs_and_broken_ones_are_refused(tmp_path: Path) -> None:
    train(tiny(), [EXAMPLES], QUICK, workdir=tmp_path)
    for data, recipe in (([EXAMPLES], replace(QUICK, lr=1e-3)), ([EXAMPLES[1:]], QUICK)):
        with pytest.raises(UsageError, match="another run"):
            train(tiny(), data, recipe, workdir=tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="can't be read"):
        train(tiny(), [EXAMPLES], QUICK, workdir=tmp_path)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_model_is_left_as_it_was_also_after_an_error(kind: str) -> None:
    base = tiny(kind)
    ids = torch.arange(12).view(2, 6) + 3
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    before = base.model(**inputs).logits
    states = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    train(base, [EXAMPLES], QUICK)

    def give_up(_now: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, [EXAMPLES], QUICK, progress=give_up)
    assert torch.equal(base.model(**inputs).logits, before)
    assert all(torch.equal(tensor, states[name]) for name, tensor in base.model.state_dict().items())
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert base.model.config._attn_implementation == "sdpa"


def test_a_bf16_base_trains_and_the_adapter_works_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny(dtype=torch.bfloat16)
    recipe = replace(QUICK, steps=60, lr=2e-2, dtype="bfloat16", targets=("q_proj", "v_proj", "down_proj"))
    result = train(base, [EXAMPLES], recipe)
    assert result.loss < 0.6 * result.curve[0]
    result.adapter.save(tmp_path)
    loaded = PeftModel.from_pretrained(tiny().model, tmp_path)
    run = start(tiny(), recipe)
    everything = list(range(len(run.examples)))
    run.close()
    with torch.no_grad():
        after, before = (full_loss(model, run, everything) for model in (loaded, tiny().model))
    assert after < 0.7 * before


def test_the_adapter_says_how_it_was_made(tmp_path: Path) -> None:
    recipe = replace(QUICK, steps=1, dtype="bfloat16", template=Template("chat"))
    base = tiny()
    base.tokenizer = tiny_bases.tokenizer(chat=True)
    train(base, [EXAMPLES], recipe, seed=7).adapter.save(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.template == Template("chat")
    assert Recipe.from_json(adapter.meta["recipe"]) == replace(recipe, seed=7, base="tiny")
    assert adapter.meta["base"] == {"name": "tiny", "architecture": "sha256:" + "a" * 64, "weights": None}
    assert {branch.A.dtype for branch in adapter.branches.values()} == {torch.bfloat16}
    assert adapter.config["r"] == 3


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(HubkitError, match="The loss became"):
        train(tiny(), [EXAMPLES], replace(QUICK, lr=1e30, schedule="constant", warmup=0.0))


@pytest.mark.parametrize(
    ("recipe", "data", "cause"),
    [
        (replace(QUICK, targets=("q_proj", "proj")), EXAMPLES, "ends in 'proj'"),
        (replace(QUICK, method="none"), EXAMPLES, "no training method 'none'"),
        (replace(QUICK, template=Template("seq2seq")), EXAMPLES, "does not fit"),
        (replace(QUICK, max_length=4), EXAMPLES, "longer than 4 tokens"),
        (replace(QUICK, validation=0.5), EXAMPLES[:1], "can't be split"),
        (QUICK, [], "no training data"),
    ],
)
def test_bad_requests_are_errors_that_say_what_to_do(recipe: Recipe, data: list[Example], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        train(tiny(), [data], recipe)
    assert caught.value.remedy


def test_recipes_go_through_their_file_format(tmp_path: Path) -> None:
    recipe = replace(QUICK, template=Template(prompt="Q: {input}"), data=("a.jsonl",), dropout=0.1)
    assert Recipe.from_json(recipe.to_json()) == recipe
    path = tmp_path / "recipe.json"
    path.write_text('{"rank": 4, "targets": "all-linear", "template": "chat"}')
    assert Recipe.load(path) == Recipe(rank=4, targets=ALL_LINEAR, template=Template("chat"))
    with pytest.raises(NotFoundError):
        Recipe.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": 1.5},
        {"lr": float("nan")},
        {"steps": True},
        {"schedule": "step"},
        {"dropout": 1.0},
        {"warmup": 8.9e305},
        {"targets": []},
        {"targets": [1]},
        {"colour": "red"},
        {"dtype": "int8"},
        {"batch": 2, "accumulation": 3},
    ],
)
def test_bad_recipes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe.from_json(values)


def test_the_rate_rises_then_falls() -> None:
    recipe = Recipe(steps=100, lr=1.0, warmup=0.1, schedule="linear")
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
    assert replace(recipe, schedule="cosine").rate(55) == pytest.approx(0.5)
    assert replace(recipe, schedule="constant").rate(99) == 1.0


def test_the_plan_shows_each_example_once_an_epoch_in_batches_of_like_length() -> None:
    lengths = [(7 * i) % 50 for i in range(101)]
    plan = Plan(lengths, 8, seed=1)
    epochs = [[plan.step(e * plan.per_epoch + i) for i in range(plan.per_epoch)] for e in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(101))
        assert sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch) < 80
    assert Plan(lengths, 8, seed=1).step(17) == epochs[1][17 - plan.per_epoch]  # no memory of earlier steps
    assert Plan([3, 4], 8, seed=1).per_epoch == 1


def test_the_split_holds_out_a_share() -> None:
    encoded = encode_all(EXAMPLES, Template(), tiny_bases.tokenizer(), 99)
    kept, held = split(encoded, 0.25, seed=3)
    assert len(held) == 6
    assert sorted(map(str, kept + held)) == sorted(map(str, encoded))
    assert split(encoded, 0.25, seed=4)[1] != held


def test_siblings_are_the_linears_with_one_input() -> None:
    llama, t5 = tiny_bases.llama(), tiny_bases.t5()
    last = [[path.rsplit(".", 1)[-1] for path in group] for group in siblings(llama, targeted(llama, ALL_LINEAR))]
    assert last == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    groups = [list(group) for group in siblings(t5, targeted(t5, ("q", "k", "v")))]
    cross = [group for group in groups if "EncDecAttention" in group[0]]
    assert [[path[-1] for path in group] for group in cross] == 2 * [["q"], ["k", "v"]]
