"""Generation, ranking, metrics and what `evaluate` makes of them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubkit import ranking
from hubkit.base import load_base
from hubkit.errors import UsageError
from hubkit.evaluate import evaluate, example_losses
from hubkit.generate import generate
from hubkit.likelihood import collate, token_losses
from hubkit.metrics import (
    METRICS,
    bootstrap_interval,
    exact_match,
    find_metric,
    majority_rate,
    paired_difference,
    rouge_l,
    token_f1,
)
from hubkit.prompt import Encoded, Template
from hubkit.ranking import Ranked, choice_losses
from hubkit.task import Example
from tests import tiny_bases


@pytest.fixture(scope="module", params=["llama", "t5"])
def base(request, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    tiny_bases.save(folder / "model", getattr(tiny_bases, request.param)())
    return load_base(folder / "model", dtype="float32", device="cpu", home=folder / "home")


def template(base: Any) -> Template:
    return Template("seq2seq" if base.seq2seq else "plain")


def random_prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [
        tuple(map(int, generator.integers(3, len(tiny_bases.TOKENS), size=generator.integers(1, 12))))
        for _ in range(count)
    ]


# generation


def plain_greedy(base: Any, prompt: tuple[int, ...], steps: int) -> list[int]:
    """One prompt, no cache, no padding, the whole sequence again for every token."""
    ids, written = torch.tensor([prompt]), [0] if base.seq2seq else list(prompt)
    start = len(written)
    for _ in range(steps):
        known = torch.tensor([written])
        logits = base.model(ids, decoder_input_ids=known) if base.seq2seq else base.model(known)
        written.append(int(logits.logits[0, -1].argmax()))
        if written[-1] == base.tokenizer.eos_token_id:
            break
    return written[start:]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_generation_is_plain_greedy_decoding_for_any_batch(base, batch_size):
    prompts = random_prompts(11)
    expected = [base.tokenizer.decode(plain_greedy(base, prompt, 9), skip_special_tokens=True) for prompt in prompts]
    assert generate(base, prompts, max_new_tokens=9, batch_size=batch_size) == expected
    assert len(set(expected)) > 5


def test_generation_stops_at_the_end_of_sequence(base):
    prompts = random_prompts(3)
    first = [plain_greedy(base, prompt, 1)[0] for prompt in prompts]
    ending = SimpleNamespace(**vars(base), pad_id=0, device=base.device)
    ending.tokenizer = tiny_bases.tokenizer()
    ending.tokenizer.eos_token = tiny_bases.TOKENS[first[0]]
    # this token is none that decoding leaves out, so the text shows where generation stopped
    assert generate(ending, prompts, max_new_tokens=9)[0] == base.tokenizer.decode(first[:1])
    assert len(plain_greedy(base, prompts[0], 9)) == 9


def test_a_models_own_sampling_settings_are_left_out(base, monkeypatch):
    prompts = random_prompts(4)
    before = generate(base, prompts, max_new_tokens=8)
    own = base.model.generation_config
    own_settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "num_beams": 2}
    for key, value in own_settings.items():
        monkeypatch.setattr(own, key, value)
    assert generate(base, prompts, max_new_tokens=8) == before


# ranking


def ranked_examples(count: int) -> list[Ranked]:
    prompts, generator = random_prompts(count, seed=1), np.random.default_rng(2)
    return [
        Ranked(prompt, tuple((*target, 2) for target in random_prompts(int(generator.integers(1, 6)), seed=i)))
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("pairs", [1, 7, 128])
def test_choice_losses_are_those_of_whole_sequences(base, pairs, monkeypatch):
    monkeypatch.setattr(ranking, "MAX_PAIRS", pairs)
    examples = ranked_examples(9)
    with torch.no_grad():
        found = dict(choice_losses(base, examples))
        for i, example in enumerate(examples):
            for target, loss in zip(example.targets, found[i].tolist(), strict=True):
                batch = collate([Encoded(example.prompt, target)], base.pad_id, seq2seq=base.seq2seq)
                assert loss == pytest.approx(float(token_losses(base.model, batch).sum()), rel=1e-4)
    assert sorted(found) == list(range(len(examples)))


# evaluation

ROWS = [Example(text, output) for text, output in [("one", "1"), ("twenty", "20"), ("three hundred", "300")]]


def with_own_answers(base: Any) -> list[Example]:
    """Examples whose reference is what the model says, or begins to say, to the input."""
    score = evaluate(base, ROWS, template(base))
    return [Example(row.input, text or "x") for row, text in zip(ROWS, score.predictions, strict=True)]


def test_losses_are_per_example_means_and_do_not_depend_on_batches(base):
    encoded = [template(base).encode(base.tokenizer, row) for row in ROWS]
    one_by_one = [float(token_losses(base.model, collate([e], 0, seq2seq=base.seq2seq)).mean()) for e in encoded]
    for size in (1, 2, 32):
        assert example_losses(base, encoded, batch_size=size) == pytest.approx(one_by_one, rel=1e-5)
    assert evaluate(base, ROWS, template(base)).loss == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_every_metric_is_perfect_on_the_models_own_answers_and_the_score_adds_up(base):
    rows = with_own_answers(base)
    longest = max(len(template(base).encode(base.tokenizer, row).target) for row in ROWS)
    short = [Example(row.input, row.output[: 2 * longest]) for row in rows]
    score = evaluate(base, [*short, Example("x", "certainly not this")], template(base))
    assert score.metric == "exact_match"
    assert (score.n, len(score.predictions), len(score.values)) == (4, 4, 4)
    assert score.accuracy == np.mean(score.values)
    expected = [exact_match(said, row.output) for said, row in zip(score.predictions, short, strict=False)]
    assert score.values == [*expected, 0]
    assert score.interval[0] <= score.accuracy <= score.interval[1]
    assert score.majority == 0.25
    assert set(score.to_json()) == {
        "metric", "accuracy", "interval", "majority", "n", "loss", "predictions"
    }  # fmt: skip


def test_choices_are_ranked_by_default_and_the_right_ones_loss_is_reported(base):
    options = ("yes", "no", "perhaps", "0")
    rows = [Example(row.input, "no", options) for row in ROWS]
    score = evaluate(base, rows, template(base))
    assert score.metric == "choice"
    for row, prediction in zip(rows, score.predictions, strict=True):
        sums = {}
        for option in options:
            encoded = template(base).encode(base.tokenizer, Example(row.input, option))
            losses = token_losses(base.model, collate([encoded], 0, seq2seq=base.seq2seq))
            sums[option] = float(losses.sum())
        assert prediction == min(sums, key=sums.__getitem__)
    generated = evaluate(base, rows, template(base), metric="exact_match")
    assert score.loss == pytest.approx(generated.loss, rel=1e-4)


def test_choice_without_choices_an_unknown_metric_and_no_rows_are_usage_errors(base):
    for rows, metric in [(ROWS, "choice"), (ROWS, "bleurt"), ([], None)]:
        with pytest.raises(UsageError):
            evaluate(base, rows, template(base), metric=metric)


def test_the_group_is_routed_around_everything_and_progress_reaches_the_end(base):
    entered, steps = [], []

    class Runtime:
        active = False

        @contextmanager
        def use(self, groups):
            entered.append(groups)
            self.active = True
            yield
            self.active = False

    runtime = Runtime()
    seen = []
    hook = base.model.register_forward_pre_hook(lambda *_: seen.append(runtime.active))
    try:
        evaluate(base, ROWS, template(base), runtime=runtime, group={"a": 0.5}, progress=lambda *s: steps.append(s))
    finally:
        hook.remove()
    assert entered == [[{"a": 0.5}]]
    assert seen
    assert all(seen)
    assert steps[-1] == (3, 3)


def test_shots_are_in_the_prompt_and_invented_examples_are_cut_off(base, monkeypatch):
    prompts = []

    def say(_base, given, **_):
        prompts.extend(given)
        return [" 7\n\nfour\nAnswer: 4"] * len(given)

    monkeypatch.setattr("hubkit.evaluate.generate", say)
    plain = Template("plain")
    score = evaluate(base, [Example("seven", "7")], plain, shots=[Example("two", "2")])
    assert base.tokenizer.decode(prompts[0]) == "two\nAnswer: 2\n\nseven\nAnswer:"
    assert (score.predictions, score.accuracy) == (["7"], 1.0)
    paragraphs = evaluate(base, [Example("seven", "7\n\nfour\nAnswer: 4")], plain)
    assert paragraphs.accuracy == 1.0


# metrics


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [(" Yes. ", "yes", 1), ("U.S.", "us", 1), ("yes!", "yes", 0), ("", "yes", 0), ("a  b", "a b", 0)],
)
def test_exact_match_normalises_as_the_reference(prediction, reference, score):
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "a cat sat down", 0.8),  # articles do not count: 2 shared of 2 and 3
        ("Cat, sat.", "cat sat", 1),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0),
        ("the", "a", 1),
        ("", "cat", 0),
    ],
)
def test_token_f1(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "police the gunman" of 4 and 4 words (Lin 2004, section 3)
    assert rouge_l("police the killed gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("cats", "cat") == 0  # no stemming


@given(st.text(max_size=30), st.text(max_size=30))
def test_metrics_stay_between_0_and_1_and_know_identity(one, other):
    for name in METRICS:
        score = find_metric(name)
        assert 0 <= score(one, other) <= 1
    assert exact_match(one, one) == token_f1(one, one) == 1


def test_majority_rate_is_the_best_constant_answers_score():
    assert majority_rate(["a", "b", "b", "c"]) == 0.5
    assert majority_rate(["x y", "x y", "x z"], "token_f1") == pytest.approx((1 + 1 + 0.5) / 3)


def test_bootstrap_interval_has_its_nominal_coverage():
    generator = np.random.default_rng(0)
    samples = generator.binomial(1, 0.3, size=(300, 80)).astype(float)
    inside = [low <= 0.3 <= high for low, high in map(bootstrap_interval, samples)]
    assert 0.90 < np.mean(inside) < 0.98


def test_bootstrap_interval_is_seeded_chunked_alike_and_degenerate_on_constants(monkeypatch):
    values = np.random.default_rng(1).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("hubkit.metrics.CHUNK", 60)
    assert bootstrap_interval(values) == whole


def test_paired_difference_sees_what_two_intervals_hide():
    generator = np.random.default_rng(2)
    hard = generator.random(100) < 0.5
    theirs = hard.astype(float)
    ours = np.where(generator.random(100) < 0.12, 1.0, theirs)
    difference = paired_difference(ours.tolist(), theirs.tolist())
    assert difference.mean == pytest.approx(ours.mean() - theirs.mean())
    assert difference.supported
    assert bootstrap_interval(ours)[0] < bootstrap_interval(theirs)[1]  # the separate intervals overlap
    assert not paired_difference(theirs.tolist(), theirs.tolist()).supported
    with pytest.raises(UsageError):
        paired_difference([1.0], [1.0, 0.0])


def test_metrics_import_no_torch():
    import subprocess
    import sys

    code = "import sys, hubkit.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
