"""The written form of mixtures."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.errors import PolicyError, UsageError
from hubkit.mixture import Mixture, Part, merge_equal, parse, split_ref
from hubkit.policy import RESERVED

DIGEST = "sha256:" + "0123456789abcdef" * 4

letters = string.ascii_letters + string.digits + "_"
segments = st.builds(
    lambda head, tail: head + tail, st.sampled_from(letters), st.text(letters + ".-", max_size=12)
).filter(lambda text: ".." not in text and text not in RESERVED)
names = st.one_of(segments, st.builds("{}/{}".format, segments, segments))
refs = st.one_of(names, st.builds("{}:{}".format, names, segments), st.just(DIGEST))
weights = st.floats(allow_nan=False, allow_infinity=False)
mixtures = st.lists(st.tuples(refs, weights), min_size=1, max_size=8, unique_by=lambda pair: pair[0]).map(
    lambda pairs: Mixture(tuple(Part(name, None, weight) for name, weight in pairs))
)


@settings(deadline=None)
@given(mixtures)
def test_what_is_written_reads_back(mixture):
    assert parse(str(mixture)) == mixture


@settings(deadline=None)
@given(mixtures, st.data())
def test_white_space_between_the_pieces_is_free(mixture, data):
    spaces = st.text(" \t\n", max_size=3)
    spaced = "+".join(
        f"{data.draw(spaces)}{part.weight!r}{data.draw(spaces)}*{data.draw(spaces)}{part.name}{data.draw(spaces)}"
        for part in mixture.parts
    )
    assert parse(spaced) == mixture


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_mixture_or_a_known_error(text):
    try:
        mixture = parse(text)
    except (UsageError, PolicyError):
        return
    assert all(math.isfinite(part.weight) for part in mixture.parts)
    assert parse(str(mixture)) == mixture


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", {"name": 1.0}),
        ("owner/name:v1.2", {"owner/name:v1.2": 1.0}),
        ("0.7*name+0.3*other:tag", {"name": 0.7, "other:tag": 0.3}),
        ("-0.2*x", {"x": -0.2}),
        ("-x", {"x": -1.0}),
        (".5 * a - 2*b", {"a": 0.5, "b": -2.0}),
        ("a+-2.*b", {"a": 1.0, "b": -2.0}),
        ("1e-3*a+2E+1*b-c", {"a": 1e-3, "b-c": 20.0}),
        ("3*3+1e5", {"3": 3.0, "1e5": 1.0}),
        ("0.5*a+0.25*a", {"a": 0.75}),
        (f"2*{DIGEST}", {DIGEST: 2.0}),
    ],
)
def test_written_forms(text, expected):
    assert parse(text).weights == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "+",
        "a+",
        "0.5*",
        "a b",
        "a**b",
        "0.5a*b",
        "0.7*a-0.3*b",
        "a+../x",
        "a:b:c",
        "a;b",
        "0,5*a",
        f"{DIGEST}0+a",
    ],
)
def test_malformed_texts_are_refused(text):
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("text", ["nan*a", "inf*a", "-Infinity*a", "1e999*a", "1e308*a+1e308*a"])
def test_weights_that_are_not_finite_are_refused(text):
    with pytest.raises(UsageError, match="weight"):
        parse(text)


@pytest.mark.parametrize("name", ["base", "sha256:12", "../../etc/passwd", "a//b", "a:"])
def test_a_single_malformed_name_is_a_matter_of_policy(name):
    with pytest.raises((PolicyError, UsageError)):
        parse(name)
    with pytest.raises(PolicyError):
        split_ref(name)


def test_equal_versions_are_added_up():
    parts = [Part("a", "d1", 0.5), Part("b", "d2", 1.0), Part("c", "d1", 0.25)]
    assert merge_equal(parts) == (Part("a", "d1", 0.75), Part("b", "d2", 1.0))


def test_unknown_modes_and_empty_mixtures_are_refused():
    with pytest.raises(UsageError, match="mode"):
        parse("a", "sum")
    with pytest.raises(UsageError, match="parts"):
        Mixture(())
