"""Prompt templates."""

from __future__ import annotations

import pytest

from hubkit.errors import UsageError
from hubkit.prompt import Template
from hubkit.task import Example
from tests import tiny_bases

EXAMPLE = Example("in {output} {input}", "out {input}")
SHOT = Example("one", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bases.tokenizer(chat=True)


def read(tokenizer, template, example, shots=()):
    encoded = template.encode(tokenizer, example, shots)
    return tokenizer.decode(encoded.prompt), tokenizer.decode(encoded.target)


def test_plain_replaces_its_two_fields_and_nothing_in_the_data(tokenizer):
    prompt, target = read(tokenizer, Template(), EXAMPLE)
    assert (prompt, target) == ("in {output} {input}\nAnswer:", " out {input}</s>")


def test_plain_puts_solved_shots_before(tokenizer):
    template = Template(prompt="Q: {input}\nA:", completion=" {output}", separator="\n--\n")
    prompt, target = read(tokenizer, template, Example("two", "2"), [SHOT, Example("six", "6")])
    assert prompt == "Q: one\nA: 1\n--\nQ: six\nA: 6\n--\nQ: two\nA:"
    assert target == " 2</s>"


def test_prompt_and_target_are_tokenised_apart(tokenizer):
    # together, the two line breaks would be one token, and the prompt would not be a prefix of the text
    encoded = Template(prompt="{input}\n", completion="\n{output}").encode(tokenizer, SHOT)
    assert tokenizer.convert_ids_to_tokens(encoded.prompt)[-1] == "Ċ"
    assert tokenizer.convert_ids_to_tokens(encoded.target)[0] == "Ċ"


def test_chat_renders_the_tokenizers_template(tokenizer):
    prompt, target = read(tokenizer, Template("chat"), Example("two", "2"), [SHOT])
    assert prompt == "<user>one\n<assistant>1\n<user>two\n<assistant>"
    assert target == "2</s>"


def test_seq2seq_gives_the_texts_as_they_are(tokenizer):
    prompt, target = read(tokenizer, Template("seq2seq"), Example("two", "2"), [SHOT])
    assert (prompt, target) == ("one 1\n\ntwo", "2")  # this tokenizer adds no end by itself, T5's does


def test_seq2seq_is_cut_to_the_tokenizers_reach():
    short = tiny_bases.tokenizer()
    short.model_max_length = 5
    encoded = Template("seq2seq").encode(short, Example("a" * 9, "b" * 9))
    assert (len(encoded.prompt), len(encoded.target)) == (5, 5)


@pytest.mark.parametrize(
    "template",
    [Template(), Template(prompt="{input}=", separator="|"), Template("chat"), Template("seq2seq")],
)
def test_json_round_trip(template):
    assert Template.from_json(template.to_json()) == template
    assert Template.from_json({**template.to_json(), "later": 1}) == template


def test_no_template_is_the_default_one():
    assert Template.from_json(None) == Template.from_json({}) == Template()


@pytest.mark.parametrize("data", [{"kind": "jinja"}, ["plain"], "plain"])
def test_a_template_that_is_none(data):
    with pytest.raises(UsageError):
        Template.from_json(data)


def test_what_cannot_be_encoded(tokenizer):
    with pytest.raises(UsageError, match="no tokens"):
        Template(prompt="{input}").encode(tokenizer, Example("", "x"))
    with pytest.raises(UsageError, match="chat template"):
        Template("chat").encode(tiny_bases.tokenizer(), SHOT)
    endless = tiny_bases.tokenizer()
    endless.eos_token = None
    with pytest.raises(UsageError, match="end-of-sequence"):
        Template().encode(endless, SHOT)
