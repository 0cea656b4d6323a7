"""The two pattern languages, by examples."""

import pytest

from transformers_quip.config.patterns import is_called, is_named, matches

NAME = "model.layers.1.mlp.up_proj"


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
