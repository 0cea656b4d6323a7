"""QuipConfig: how a model is quantized, which options fit together, and its place in config.json.

The table of options is in `options`, their checks are in `checks`, and the types that editors see in `typed`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import codebooks, rounding
from ..registry import suggest
from ..version import __version__
from . import storage
from .bits import averages, is_average, mixed_bits
from .checks import short
from .options import OPTIONS
from .patterns import matches
from .storage import Storage
from .typed import TypedOptions

QUANT_METHOD = "quip"
FORMAT_VERSION = 1

# Written by the quantizer, not by the caller.
# Attribute → its key in config.json.
_RECORDS = {"calibration": "calibration", "quantized_modules": "quantized_modules", "storage": "layout", "origin": "origin"}
# Options that a quantized checkpoint must have: with their defaults, its codes would be other numbers.
_DECODING = ("bits", "codebook", "incoherence", "seed", "residual_scale")


class QuipConfig(TypedOptions, QuantizationConfigMixin):
    """How to quantize a model with QuIP# (arXiv 2402.04396), and how a saved model was quantized.

        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(bits=2))

    All options are keywords and can be read as attributes. An unknown option, a value of the wrong type and a
    combination that cannot work raise `ValueError` with the option, the value and the allowed values.

    Attributes:
        calibration: after a calibrated run, which data was used (a JSON-serialisable dict); else None.
        quantized_modules: after any run, the names of the quantized modules, in the short form of
            `checkpoints.names.compress_names`; else None.
        origin: after any run, which model was quantized, and by which versions (`hub.origin.describe`); else None.
        storage: for a model that was re-packed from a checkpoint of another package, how its tensors are stored:
            {pattern: {…}} with the attributes of [`Storage`]; else None. In config.json it is called "layout".
        foreign: the own description of such a checkpoint's quantization, while it is loaded; not saved.

    Options:
    """

    if not TYPE_CHECKING:  # type checkers see the keywords of `TypedOptions`

        def __init__(self, **options: Any):
            unknown = [name for name in options if name not in OPTIONS]
            if unknown:
                raise ValueError(_unknown_option(unknown[0], options[unknown[0]]))
            self.quant_method = QUANT_METHOD
            for name, option in OPTIONS.items():
                setattr(self, name, options.get(name, option.default))
            if "bits" not in options and codebooks.is_known(self.codebook):
                self.bits = codebooks.get(self.codebook).bits
            self.calibration: dict[str, Any] | None = None
            self.quantized_modules: list[str] | None = None
            self.origin: dict[str, Any] | None = None
            self.storage: dict[str, dict] | None = None
            self.foreign: dict[str, Any] | None = None
            self.validate()

    def validate(self) -> None:
        """Check every option and their combination, and settle `codebook`. Raises `ValueError`."""
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            try:
                setattr(self, name, option.check(value))
            except ValueError as error:
                raise ValueError(f"QuipConfig: {name}={short(value)} {error}") from None
        if self.tune != "none" and self.dataset is None:
            raise ValueError(
                f"QuipConfig: tune={short(self.tune)} needs text, and dataset=None gives none: choose a data set or 'self'"
            )
        if self.tensor_parallel is not None and self.incoherence != "hadamard":
            raise ValueError(
                f"QuipConfig: tensor_parallel={self.tensor_parallel} chooses the transforms of each linear, so "
                f"incoherence={self.incoherence!r} cannot hold for all of them: leave one of the two out, or set "
                "incoherence for single modules in `modules`"
            )
        if self.is_mixed:
            self._validate_mixed()
        else:
            self._validate_codebook()
        for pattern, options in (self.modules or {}).items():
            try:
                self._with(options)
            except ValueError as error:
                raise ValueError(
                    f"QuipConfig: modules has {pattern!r}: {options!r}, which cannot be used: {error}"
                ) from None

    def _validate_mixed(self) -> None:
        if self.residual_scale is not None:
            raise ValueError(
                f"QuipConfig: bits={self.bits} is an average over modules, so residual_scale={self.residual_scale} cannot "
                "hold for all of them: leave it out, or choose bits that a codebook has"
            )
        if self.dataset is None:
            raise ValueError(
                f"QuipConfig: bits={self.bits} is an average over modules, which are measured on data, and dataset=None "
                "gives none. Choose a data set or 'self', or set bits for patterns of names in `modules`"
            )
        for bits in mixed_bits(self.bits, self.codebook):
            self._with({"bits": bits})

    def _validate_codebook(self) -> None:
        name = self.codebook
        if name is None or self._is_open:
            known, (lowest, highest) = codebooks.bits_of(name), averages(name)
            if self.bits not in known:
                families = ", ".join(map(repr, codebooks.families()))
                more = "" if name else f" ({families} has codebooks of more bits)"
                raise ValueError(
                    f"QuipConfig: bits={self.bits} must be one of {', '.join(f'{bits:g}' for bits in known)}, the bits "
                    f"that a codebook has{more}, or any number between {lowest:g} and {highest:g}: an average, for which "
                    "each module gets bits of its own"
                )
            self.codebook = name = codebooks.default_for_bits(self.bits, name)
        book = codebooks.get(name)
        actual = book.bits
        if actual != self.bits:
            fitting = [known for known in codebooks.names() if codebooks.get(known).bits == self.bits]
            fitting += [family for family in codebooks.families() if self.bits in codebooks.bits_of(family)]
            raise ValueError(
                f"QuipConfig: bits={self.bits} and codebook={name!r}, which has {actual:g} bits, contradict "
                f"each other; codebooks of {self.bits} bits: {', '.join(map(repr, fitting)) or 'none'}"
            )
        if self.residual_scale is not None and book.residual_scale is None:
            staged = [known for known in codebooks.names() if codebooks.get(known).residual_scale is not None]
            raise ValueError(
                f"QuipConfig: residual_scale={self.residual_scale} needs a codebook of two stages, and codebook="
                f"{name!r} has one; choose one of {', '.join(map(repr, staged))}"
            )
        method = rounding.get(self.rounding)
        if not method.works_with(book):
            books = ", ".join(repr(known) for known in codebooks.names() if method.works_with(codebooks.get(known)))
            methods = f"methods for {name!r}: {', '.join(map(repr, _methods(name)))}"
            if book.is_read_only:
                methods = f"{name!r} is for checkpoints that were made elsewhere, and no method rounds to it"
            raise ValueError(
                f"QuipConfig: rounding={self.rounding!r} does not work with codebook={name!r}, only with "
                f"{books or 'none that is registered'}; {methods}"
            )

    def _with(self, options: dict[str, Any]) -> QuipConfig:
        """A copy with other options for one module."""
        result = copy.copy(self)
        result.modules = result.tensor_parallel = None
        if "codebook" in options:
            if codebooks.is_known(options["codebook"]) and "bits" not in options:
                result.bits = codebooks.get(options["codebook"]).bits
            elif self.is_mixed and "bits" not in options:
                raise ValueError(
                    f"codebook={options['codebook']!r} needs a number of bits here, because bits={self.bits} of the other "
                    "modules is an average"
                )
        elif "bits" in options:
            result.codebook = self._family
        if "bits" in options or "codebook" in options:
            result.residual_scale = None  # it belongs to the codebook that it was given with
        result.__dict__.update(options)
        result.validate()
        return result

    @property
    def codebook_spec(self) -> str:
        """The codebook with its residual scale in one name, as modules and ops take it (`codebooks.spec`).

        Raises:
            ValueError: `bits` is an average, for which only single modules have a codebook.
        """
        if self.codebook is None or self._is_open:
            raise ValueError(f"bits={self.bits} is an average over modules: ask `for_module` for the codebook of one")
        return codebooks.spec(self.codebook, self.residual_scale)

    def for_module(self, name: str) -> QuipConfig:
        """The config that holds for the module of this name: this one, or a copy with its options of `modules`."""
        options = self.options_of(name)
        return self._with(options) if options else self

    def options_of(self, name: str) -> dict[str, Any]:
        """The options of `modules` for the module of this name."""
        options: dict[str, Any] = {}
        for pattern, values in (self.modules or {}).items():
            if matches(name, pattern):
                options = _overridden(options, values)
        return options

    def with_modules(self, modules: dict[str, dict[str, Any]]) -> QuipConfig:
        """A copy with options for more modules, before the patterns of the caller, which still hold: later ones win."""
        modules = dict(modules)
        for pattern, options in (self.modules or {}).items():
            modules[pattern] = modules.pop(pattern, {}) | options  # a pattern may be the name of one module
        result = copy.copy(self)
        result.modules = modules
        return result

    def settle_modules(self, names: Iterable[str]) -> None:
        """Make the meaning of `modules` independent of its order: Transformers sorts the keys of config.json.

        It is unchanged if no two patterns that match one of these modules set the same option; else it names each module.
        """
        names = list(names)
        for name in names:
            found = [values for pattern, values in (self.modules or {}).items() if matches(name, pattern)]
            keys = [key for values in found for key in ({"bits"} if "codebook" in values else set()) | values.keys()]
            if len(keys) != len(set(keys)):
                self.modules = {name: options for name in names if (options := self.options_of(name))}
                return

    def storage_of(self, name: str) -> Storage:
        """How the tensors of the quantized linear of this name are stored."""
        values: dict[str, Any] = {}
        for pattern, more in (self.storage or {}).items():
            if matches(name, pattern):
                values.update(more)
        return Storage.from_dict(values) if values else storage.PLAIN

    @property
    def is_mixed(self) -> bool:
        """Whether `bits` is an average, so that each module is to get bits of its own (see `quantize.allocate`)."""
        return self._is_open and is_average(self.bits, self.codebook)

    @property
    def sweeps(self) -> int:
        """`refinement_sweeps`, or the codebook's own number if it is None."""
        if self.refinement_sweeps is not None:
            return self.refinement_sweeps
        return codebooks.get(self.codebook_spec).refinement_sweeps

    @property
    def _is_open(self) -> bool:
        """Whether the codebook is still to be chosen by the bits."""
        return self.codebook is None or self.codebook in codebooks.families()

    @property
    def _family(self) -> str | None:
        """The family that the codebook belongs to: a module of other bits gets a codebook of the same."""
        family = (self.codebook or "").partition(":")[0]
        return family if family in codebooks.families() else None

    @property
    def is_calibrated(self) -> bool:
        """Whether the model is to be run on data before it is quantized."""
        return self.dataset is not None

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that may change when a quantized model is loaded; Transformers asks for them. None may change."""
        return {}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the options among `kwargs`, checked, and return the rest. Nothing changes if one is not valid."""
        trial = copy.copy(self)
        for name in OPTIONS.keys() & kwargs.keys():
            setattr(trial, name, kwargs[name])
        trial.validate()
        self.__dict__.update(trial.__dict__)
        return {name: value for name, value in kwargs.items() if name not in OPTIONS}

    def get(self, key: str, default: Any = None) -> Any:
        """As in the dict that [`to_dict`] returns: Transformers reads a loaded model's quantization_config like a dict."""
        return self.to_dict().get(key, default)

    def without_data(self) -> QuipConfig:
        """A copy that holds the content of config.json, not the data set or the tokenizer itself."""
        result = copy.copy(self)
        for name, option in OPTIONS.items():
            setattr(result, name, option.stored(getattr(self, name)))
        return result

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: JSON-serialisable, and equal after [`from_dict`]."""
        result: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        result.update((name, option.stored(getattr(self, name))) for name, option in OPTIONS.items())
        result.update((key, copy.deepcopy(getattr(self, name))) for name, key in _RECORDS.items())
        if self.storage is None:
            del result["layout"]  # as in most models
        return result

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a saved model, or of a dict of options.

        Args:
            config_dict: as [`to_dict`] returns it. Without "format_version" it is read as options.
            return_unused_kwargs: return (config, the kwargs that are not options).
            kwargs: options to change.

        Raises:
            ValueError: another quant_method, an unknown format_version, an unknown key, codebook or transform.
        """
        values = dict(config_dict)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method={method!r} is not {QUANT_METHOD!r}")
        if "format_version" in values:
            config = cls._from_saved(values)
        elif values.keys() & set(_RECORDS.values()):
            raise ValueError(f"The saved quantization_config has no format_version: {values!r}")
        else:
            config = cls(**values)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _from_saved(cls, values: dict[str, Any]) -> QuipConfig:
        version = values.pop("format_version")
        records = {name: values.pop(key, None) for name, key in _RECORDS.items()}
        newer = f"it may need a newer transformers-quip than {__version__}: pip install -U transformers-quip"
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f"The model was saved with format_version={version!r}; this transformers-quip reads version "
                f"{FORMAT_VERSION}: {newer}"
            )
        unknown = sorted(name for name in values if name not in OPTIONS)
        if unknown:
            raise ValueError(
                f"The saved quantization_config has {', '.join(map(repr, unknown))}, which format version "
                f"{FORMAT_VERSION} does not have (it has {', '.join(OPTIONS)}): {newer}"
            )
        calibration, quantized = records["calibration"], records["quantized_modules"]
        for name in ("calibration", "origin"):
            if not (records[name] is None or isinstance(records[name], dict)):
                raise ValueError(f"The saved quantization_config has {name}={short(records[name])}: it must be a dict")
        if not (quantized is None or (isinstance(quantized, list) and all(isinstance(n, str) for n in quantized))):
            raise ValueError(
                f"The saved quantization_config has quantized_modules={short(quantized)}: it must be a list of names"
            )
        lost = [name for name in _DECODING if name not in values]
        if lost and quantized is not None:
            raise ValueError(f"The saved quantization_config has no {lost[0]}, so its codes have no meaning: {newer}")
        try:
            config = cls(**values)
            config.storage = storage.check(records["storage"])
        except ValueError as error:
            raise ValueError(f"The saved quantization_config cannot be used: {error}; {newer}") from None
        config.calibration, config.quantized_modules, config.origin = calibration, quantized, records["origin"]
        return config

    def __deepcopy__(self, memo: dict) -> QuipConfig:
        """Transformers copies configs freely; the data set and the tokenizer are shared, not copied."""
        result = copy.copy(self)
        for name in _RECORDS:
            setattr(result, name, copy.deepcopy(getattr(self, name), memo))
        memo[id(self)] = result
        return result

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuipConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment] # as Python itself does for a class with __eq__ alone


QuipConfig.__signature__ = inspect.signature(TypedOptions)
QuipConfig.__doc__ = (
    (QuipConfig.__doc__ or "").rstrip()
    + "\n"
    + "".join(f"        {name} (default {option.default!r}): {option.doc}\n" for name, option in OPTIONS.items())
)


def _methods(codebook: str) -> list[str]:
    """The rounding methods that work with this codebook."""
    return [name for name in rounding.names() if rounding.get(name).works_with(codebooks.get(codebook))]


def _overridden(options: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The options of two patterns, of which the later one wins: one that sets bits or codebook sets both."""
    if values.keys() & {"bits", "codebook"}:
        options = {name: value for name, value in options.items() if name not in ("bits", "codebook")}
    return options | values


def _unknown_option(name: str, value: Any) -> str:
    return f"QuipConfig has no option {name!r} (given {short(value)}), only {', '.join(OPTIONS)}{suggest(name, OPTIONS)}"
