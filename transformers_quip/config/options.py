"""The table of QuipConfig's options: for each its default, its check, its sentence, and its form in config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import rounding
from . import checks as check
from .data import describe_dataset
from .patterns import check_patterns
from .tune import TuneOptions

# The options that `modules` may set for single modules, as format version 1 knows them.
MODULE_OPTIONS = (
    "bits",
    "codebook",
    "residual_scale",
    "incoherence",
    "rescale",
    "rounding",
    "damping",
    "refinement_sweeps",
    "refit",
    "scale",
)


@dataclass(frozen=True)
class Option:
    """One option of [`QuipConfig`].

    Args:
        default: its value if the caller gives none.
        check: returns the value as it is kept, or raises `ValueError` saying which values are allowed.
        doc: one sentence for the user.
        stored: the form of a value in config.json, where the value itself only lives at run time.
    """

    default: Any
    check: Callable[[Any], Any]
    doc: str
    stored: Callable[[Any], Any] = copy.deepcopy


def _modules(value: Any) -> dict[str, dict] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ValueError("must be None or a dict of {module name or pattern: {option: value}}")
    check_patterns(value)
    checked: dict[str, dict] = {}
    for pattern, options in value.items():
        if not isinstance(options, dict) or not options:
            raise ValueError(f"has {pattern!r}: {check.short(options)}, but each pattern needs a dict of {{option: value}}")
        unknown = [name for name in options if name not in MODULE_OPTIONS]
        if unknown:
            raise ValueError(
                f"has {pattern!r}: {unknown[0]!r}, but the options that can be set for single modules are "
                f"{', '.join(map(repr, MODULE_OPTIONS))}"
            )
        checked[pattern] = {}
        for name, item in options.items():
            try:
                checked[pattern][name] = OPTIONS[name].check(item)
            except ValueError as error:
                raise ValueError(f"has {pattern!r}: {name}={check.short(item)}, which {error}") from None
    return checked


def _tune(value: Any) -> str | dict[str, Any]:
    try:
        options = TuneOptions.parse(value)
    except ValueError as error:
        raise ValueError(f"cannot be used: {error}") from None
    return value if isinstance(value, str) else options.to_dict()


# Every option once: the signature, the checks, the documentation and the JSON form come from this table.
OPTIONS: dict[str, Option] = {
    "bits": Option(
        2,
        check.bits,
        "Code bits per weight; not needed if `codebook` names a single one. A number that no codebook has, such as 2.5, is "
        "an average: modules get 2, 3 or 4 bits by the measured effect of their errors.",
    ),
    "codebook": Option(
        None,
        check.codebook,
        "Which values a block of weights may take; None: the default for `bits`. 'trellis': the best trellis code of that "
        "many bits (1 to 8, and 1.5, 2.5 and 3.5), with smaller errors than the default and more time to find them.",
    ),
    "residual_scale": Option(
        None, check.residual_scale, "The factor of the second stage of a codebook that has one; None: the codebook's own."
    ),
    "incoherence": Option(
        "hadamard",
        check.incoherence,
        "The orthogonal transform on both sides of a weight, or a pair of them: (input side, output side). 'hadamard-N' "
        "mixes only the numbers of each block of N, 'hadamard/N' those of each of N blocks.",
    ),
    "tensor_parallel": Option(
        None,
        check.optional(check.integer(2, 1024)),
        "The number of devices that will share each layer. Each linear gets that many blocks of the Hadamard transform on "
        "the side that is divided, so that sharing costs no more traffic than with dense weights. Divisors of this number "
        "can share it, too, and so can one device.",
    ),
    "rescale": Option(
        True,
        check.boolean,
        "QuIP's diagonal rescaling: input columns that matter more get finer steps. Needs calibration.",
    ),
    "rounding": Option("ldlq", check.name(rounding.names), "How the codes are chosen."),
    "dataset": Option(
        "self",
        check.dataset,
        "The calibration data: 'self' (text that the model writes itself; needs neither network nor tokenizer), "
        "'self:NAME' (text that another, smaller model writes), the name of a data set that Optimum knows (wikitext2, c4, "
        "...), a list of texts, of chats (lists of messages), of token ids or of dictionaries, a tensor of token ids, a "
        "tokenizer's output, a `datasets.Dataset`, a stream (an `IterableDataset`, a generator) of such rows, which is "
        "read as far as needed, or None: no calibration, each weight is quantized while it is loaded. Padding is left out, "
        "by the attention_mask or by repeated end tokens.",
        describe_dataset,
    ),
    "tokenizer": Option(
        None,
        check.tokenizer,
        "For a data set of texts or chats: a tokenizer, or where to load one; None: the model's own, read with the "
        "arguments with which the model was loaded (revision, token, subfolder, ...).",
        lambda value: value if isinstance(value, str) else None,
    ),
    "text_column": Option(
        "text",
        check.text,
        "The column of a `datasets.Dataset`, or the key of dictionaries, to calibrate on: texts, chats or token ids. With "
        "'text', the default, 'input_ids' (and 'attention_mask') goes before it, and 'messages' or 'conversations' are "
        "used if 'text' is missing.",
    ),
    "calibrate_on": Option(
        "mixed",
        check.choice("mixed", "quantized", "dense"),
        "The model whose activations a block is calibrated on: 'quantized', with all blocks before it quantized; 'dense', "
        "the original model, as in the paper; 'mixed', the batches alternate between the two.",
    ),
    "outside_blocks": Option(
        "dense",
        check.choice("dense", "uncalibrated"),
        "Linears and experts that a calibrated run does not reach, because they are outside the blocks of the text model: "
        "towers for images and sounds, projectors. 'dense' leaves them as they are; 'uncalibrated' rounds them to the "
        "nearest points, which needs 8 bits to lose nothing (set `bits` for them in `modules`).",
    ),
    "num_samples": Option(256, check.integer(1), "Number of token sequences to calibrate on."),
    "sequence_length": Option(512, check.integer(1), "Tokens in each of them."),
    "batch_size": Option(8, check.integer(1), "Sequences in one forward pass."),
    "damping": Option(
        0.01, check.positive, "Added to the Hessian's diagonal, as a share of its mean; grows until Cholesky works."
    ),
    "sketch": Option(
        "outputs",
        check.choice("outputs", "A", "B"),
        "Second moments of the gradients that rounding='yaqa' needs: 'outputs', of the gradients of outputs alone; 'A' and "
        "'B', the sketches of the paper, for thousands of sequences.",
    ),
    "sketch_samples": Option(64, check.integer(1), "Token sequences for these gradients; at most `num_samples`."),
    "refinement_sweeps": Option(
        None,
        check.optional(check.integer(0)),
        "Passes over the codes after the first rounding; None: as many as pay for the codebook, 10, or 0 of a trellis.",
    ),
    "refit": Option(
        0, check.integer(0), "How often su is fitted to the codes after rounding, in turn with sv; 0 fits only sv."
    ),
    "scale": Option(
        "auto", check.scale, "'auto': measured for each weight; a number multiplies the scale published for the codebook."
    ),
    "modules_to_not_convert": Option(
        None,
        check.patterns,
        "Names, suffixes or regular expressions of modules to leave dense, besides the output embeddings.",
    ),
    "modules": Option(
        None,
        _modules,
        "Options for single modules: {pattern: {option: value}}. A shell pattern such as '*.down_proj' or 'down_proj' "
        "means a module's whole name or its end after a dot; if several match, later ones win. Output embeddings and "
        "embeddings that are not tied are quantized if a pattern calls them by name: {'lm_head': …, 'embed_tokens': …}.",
    ),
    "tune": Option(
        "none",
        _tune,
        "Training: 'none', 'vectors' (after rounding, su, sv and the norms learn the dense model's predictions on the "
        "calibration text; the result is kept only if it is better on windows that were held out), 'full' (each block is "
        "also tuned while it is rounded, in QuIP#'s order), or a dictionary of the attributes of "
        "`config.tune.TuneOptions`.",
    ),
    "seed": Option(0, check.integer(0), "Random seed."),
}
