"""The two pattern languages by examples, and patterns that would use up the processor."""

import time

import pytest

from transformers_quip import QuipConfig
from transformers_quip.config import storage
from transformers_quip.config.patterns import LONGEST, MOST_PATTERNS, check_patterns, is_called, is_named, matches

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.layers.1.mlp.up_proj", True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("p_proj", False),
        ("layers.1", False),
        ("*", True),
        ("*.up_proj", True),
        ("*up_proj", True),
        ("layers.?.*", True),
        ("layers.??.*", False),
        ("[lm]*.up_proj", True),
        ("model.layers.[02]*", False),
        ("model.*.mlp.????????", False),
        ("model.*.mlp.???????", True),
        ("**************************model.layers.1.mlp.up_proj", True),
        ("?" * 26, True),
        ("?" * 27, False),
        ("[u][p]_proj", True),
    ],
)
def test_matches(pattern, meant):
    assert matches("model.layers.1.mlp.up_proj", pattern) is meant


@pytest.mark.parametrize("character", ["?", "[a]", "*?"])
def test_many_long_patterns_cost_little(character):
    """3000 patterns of 2000 question marks once took 20 seconds: they are refused, and those that may be are fast."""
    patterns = [f"{number}{character * (LONGEST // len(character) - 4)}" for number in range(MOST_PATTERNS)]
    start = time.process_time()
    check_patterns(patterns)
    assert not any(matches("model.layers.1.mlp.up_proj", pattern) for pattern in patterns)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("names", "said"),
    [(["?" * 2000], "of 2000 characters: at most 500"), ([f"*{i}" for i in range(1001)], "1001 patterns with wildcards")],
)
def test_too_much(names, said):
    with pytest.raises(ValueError, match=f"modules=.* has .*{said}"):
        QuipConfig(modules={name: {"bits": 4} for name in names})
    with pytest.raises(ValueError, match=said):
        storage.check({name: {"row_scales": True} for name in names})


def test_names_without_wildcards_are_not_limited():
    check_patterns(f"model.layers.{number}.mlp.up_proj" for number in range(10_000))


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("model.layers.1", True),
        ("model.layers", True),
        ("layers.1", False),
        ("up_proj", True),
        ("1.mlp.up_proj", True),
        (r".*\.mlp", True),
        (r"model\.layers\.[2-9]", False),
        ("model.layers.1.mlp.up", False),
        ("model.layers.1.", True),
        ("model.lay|model.layers.1.mlp", True),
        ("model.lay|model.layers.2", False),
    ],
)
def test_names_are_matched_as_in_transformers(pattern, named):
    assert is_named(NAME, ["nothing", pattern]) is named


@pytest.mark.parametrize(
    ("pattern", "matched", "called"),
    [
        (NAME, True, True),
        ("up_proj", True, True),
        ("mlp.up_proj", True, True),
        ("*.up_proj", True, True),
        ("model.layers.?.*.up_proj", True, True),
        ("layers.[12].mlp.up_proj", True, True),
        ("*up_proj", True, False),
        ("*", True, False),
        ("model.layers.1.*", True, False),
        ("mlp", False, False),
        ("p_proj", False, False),
        ("layers.[2-9].*", False, False),
        ("UP_PROJ", False, False),
    ],
)
def test_shell_patterns(pattern, matched, called):
    assert matches(NAME, pattern) is matched
    assert is_called(NAME, [pattern]) is called
    assert is_called(NAME, ["nothing", pattern]) is called
