"""The command line: every command on a tiny model, JSON, exit codes, and help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.child import environment
from transformers_quip import QuipConfig, cli
from transformers_quip.cli.destination import new_folder
from transformers_quip.cli.quantize import command as quantize_command
from transformers_quip.cli.quantize import config_options
from transformers_quip.config import OPTIONS
from transformers_quip.nn.replace import quantized_linears


def run(capsys, *arguments):
    """(exit code, JSON or text of stdout, stderr)"""
    capsys.readouterr()
    code = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    out = json.loads(captured.out) if "--json" in arguments and captured.out else captured.out
    return code, out, captured.err


def test_quantize(quantized, dense, text):
    model = AutoModelForCausalLM.from_pretrained(quantized)
    config = model.config.quantization_config
    assert config.num_samples == 2
    assert config.refinement_sweeps == 1
    assert "20 texts given by the caller" in config.dataset
    assert config.origin["folder"] == dense.name
    assert AutoTokenizer.from_pretrained(quantized)("abc")["input_ids"] == [97, 98, 99]
    assert "import transformers_quip" in (quantized / "README.md").read_text()
    assert "Relative error" in (quantized.parent / "report.html").read_text()
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["report.html", "tiny-2bit"]
    # the same through Python
    documents = text.read_text().split("\n\n")
    same = QuipConfig(dataset=documents, num_samples=2, sequence_length=16, refinement_sweeps=1)
    expected = AutoModelForCausalLM.from_pretrained(dense, quantization_config=same).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_quantize_says_what_it_did(dense, tmp_path, capsys):
    code, out, _ = run(capsys, "quantize", dense, tmp_path / "a", "--dataset", "none", "--skip", "up_proj", "--json")
    assert code == 0
    assert out["quantized_layers"] == 12
    assert out["calibration"] is None
    assert out["weight_bytes"] < out["dense_bytes"]


def test_a_place_that_is_taken(dense, tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    code, _, error = run(capsys, "quantize", dense, tmp_path, "--dataset", "none")
    assert code == cli.UNUSABLE
    assert "is not empty" in error
    assert (tmp_path / "keep.txt").read_text() == "mine"
    code, _, error = run(capsys, "quantize", dense, tmp_path, "--dataset", "none", "--overwrite")
    assert code == cli.UNUSABLE
    assert "is not a model's folder" in error
    assert (tmp_path / "keep.txt").read_text() == "mine"
    (tmp_path / "config.json").write_text("{}")
    assert run(capsys, "quantize", dense, tmp_path, "--dataset", "none", "--overwrite")[0] == 0
    assert (tmp_path / "keep.txt").read_text() == "mine"  # the model is replaced, nothing else
    code, _, error = run(capsys, "quantize", tmp_path, tmp_path, "--dataset", "none", "--overwrite")
    assert code == cli.UNUSABLE
    assert "the model that is read" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bits", "7"], cli.UNUSABLE, "bits=7 must be one of"),
        (["--codebook", "e8q"], cli.UNUSABLE, "did you mean 'e8p'"),
        (["--option", "swepes=3"], cli.UNUSABLE, "no option 'swepes'"),
        (["--option", "nothing"], cli.UNUSABLE, "must be NAME=VALUE"),
        (["--num-samples", "many"], cli.USAGE, "not a valid integer"),
        (["--dataset", "none", "--report", "r.html"], cli.USAGE, "--report needs calibration"),
        (["--dataset", "typo.txt"], cli.UNUSABLE, "the file does not exist"),
        (["--dtype", "int8"], cli.USAGE, "'int8' is not one of"),
        (["--bits", "two"], cli.USAGE, "not a valid float"),
        (["--peers", "none.json"], cli.USAGE, "does not exist"),
    ],
)
def test_wrong_options_are_named_before_any_work(dense, tmp_path, capsys, arguments, code, message):
    found, _, error = run(capsys, "quantize", dense, tmp_path / "out", *arguments)
    assert found == code
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(dense, tmp_path, capsys):
    code, _, error = run(capsys, "quantize", "nobody/nothing", tmp_path / "out", "--dataset", "none")
    assert code == cli.UNREACHABLE
    assert error.startswith("error: ")
    there, out = f"there is no folder {tmp_path / 'no'}", tmp_path / "out"
    for arguments in (("quantize", out), ("convert", out), ("tune", out, "--dense", dense), ("inspect",), ("chat",)):
        code, _, error = run(capsys, arguments[0], tmp_path / "no", *arguments[1:])
        assert code == cli.UNREACHABLE
        assert there in error
    assert run(capsys, "inspect", tmp_path)[0] == cli.UNUSABLE
    assert run(capsys, "nonsense")[0] == cli.USAGE


def test_the_defaults_are_those_of_the_config():
    shown = {option.name: option.default for option in quantize_command.params}
    for name in ("dataset", "num_samples", "sequence_length", "batch_size", "seed", "tune"):
        assert shown[name] == OPTIONS[name].default
    made = QuipConfig(**config_options(None, None, "self", (), ("scale=0.9", "codebook=e8p")))
    assert made == QuipConfig(scale=0.9)
    assert QuipConfig(**config_options(None, None, "self", (), (), tune="full")) == QuipConfig(tune="full")


def test_tensor_parallel():
    with quantize_command.make_context("quantize", ["MODEL", "OUT", "--tensor-parallel", "4"]) as context:
        names = ("bits", "codebook", "dataset", "skip", "options", "tensor_parallel")
        options = config_options(**{name: context.params[name] for name in names})
    assert QuipConfig(**options) == QuipConfig(tensor_parallel=4)


def test_inspect(quantized, capsys):
    code, content, _ = run(capsys, "inspect", quantized, "--json")
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert content["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    kinds = {kind["kind"]: kind for kind in content["kinds"]}
    assert kinds["model.layers.*.mlp.up_proj"]["number"] == 2
    assert kinds["model.layers.*.mlp.up_proj"]["shape"] == [96, 64]
    shown = run(capsys, "inspect", quantized)[1]
    assert f"{content['true_bits']:.3f}" in shown
    assert "model.layers.1.mlp.up_proj" in run(capsys, "inspect", quantized / "config.json", "--layers")[1]


def test_evaluate(quantized, dense, text, capsys):
    options = ["--dataset", text, "--windows", 3, "--length", 32, "--new-tokens", 3]
    written = ["--texts", 2, "--text-length", 9]
    code, content, _ = run(capsys, "evaluate", quantized, "--dense", dense, *written, *options, "--save", "--json")
    assert code == 0
    from transformers_quip.evaluation import divergence, generation_quality, perplexity

    ids = torch.tensor(list(map(ord, text.read_text()))[:96]).view(3, 32)
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (quantized, dense))
    assert content["perplexity"] == pytest.approx(perplexity(model, ids), rel=1e-6)
    assert content["dense_perplexity"] == pytest.approx(perplexity(reference, ids), rel=1e-6)
    assert content["divergence"]["mean"] == pytest.approx(divergence(model, reference, ids).mean, rel=1e-5)
    expected = generation_quality(model, reference, ids[:2, :16], 9)
    assert content["generation"] == {
        "perplexity": pytest.approx(expected.perplexity, rel=1e-6),
        "own_perplexity": pytest.approx(expected.own_perplexity, rel=1e-6),
        "repetition": expected.repetition,
        "own_repetition": expected.own_repetition,
        "texts": 2,
        "prompt_tokens": 16,
        "written_tokens": 9,
    }
    assert content["speed"]["written_tokens"] == 3
    assert content["protocol"] == "text.txt, 3 windows of 32 tokens"
    card = (quantized / "README.md").read_text()
    figures = f"{content['perplexity']:.4g} | {content['dense_perplexity']:.4g} | {content['divergence']['mean']:.4f}"
    own = content["generation"]
    assert (
        f"| text.txt | {figures} | {own['perplexity']:.4g} | {own['own_perplexity']:.4g} | {own['repetition']:.1%} |"
        in card
    )
    assert "model-index" in card
    shown = run(capsys, "evaluate", quantized, *options[:-1], 0)[1]
    assert f"{content['perplexity']:.4g}" in shown
    shown = run(capsys, "evaluate", quantized, "--dense", dense, *written, *options[:-1], 0)[1]
    assert f"{own['perplexity']:.4g}" in shown
    assert f"{own['own_repetition']:.1%}" in shown


@pytest.mark.parametrize("dataset", ["text", "self"])
def test_evaluate_has_one_model_in_memory(quantized, dense, text, capsys, monkeypatch, dataset):
    from transformers_quip.cli import evaluate

    loaded, load = [], evaluate.load_model

    def alone(source, **options):
        assert not [name for name, model in loaded if model() is not None], source
        model = load(source, **options)
        loaded.append((str(source), weakref.ref(model)))
        return model

    monkeypatch.setattr(evaluate, "load_model", alone)
    options = ["--windows", 2, "--length", 16, "--new-tokens", 0, "--texts", 1, "--text-length", 8]
    code, _, error = run(
        capsys, "evaluate", quantized, "--dense", dense, "--dataset", text if dataset == "text" else "self", *options
    )
    assert code == 0, error
    order = [quantized, dense] if dataset == "text" else [dense, quantized, dense]
    assert [name for name, _ in loaded] == list(map(str, order))


def test_evaluate_a_model_whose_predictions_cannot_be_kept(quantized, dense, text, capsys, monkeypatch):
    """Its logits do not follow from its hidden states in a known way, so both models are in memory."""
    from transformers_quip.cli import evaluate

    options = [
        "--dense",
        dense,
        "--dataset",
        text,
        "--windows",
        2,
        "--length",
        16,
        "--texts",
        0,
        "--new-tokens",
        0,
        "--json",
    ]
    expected, load = run(capsys, "evaluate", quantized, *options)[1], evaluate.load_model

    def squared(source, **options):
        model = load(source, **options)
        model.register_forward_hook(square)
        return model

    def square(module, arguments, output):
        output.logits = output.logits * output.logits.abs()

    assert "generation" not in expected
    monkeypatch.setattr(evaluate, "load_model", squared)
    code, found, error = run(capsys, "evaluate", quantized, *options)
    assert code == 0, error
    assert "both models are in memory at once: LlamaForCausalLM computes its logits" in error
    assert found["divergence"]["mean"] != pytest.approx(expected["divergence"]["mean"], rel=1e-3)


def test_compare(quantized, dense, text, capsys):
    code, content, _ = run(capsys, "compare", quantized, dense, "--json")
    assert code == 0
    assert set(content) == {str(quantized), str(dense)}
    code, content, _ = run(capsys, "compare", quantized, dense, "--dataset", text, "--windows", 2, "--length", 16, "--json")
    assert content["predictions"]["divergence"]["positions"] == 30
    assert "true bits per weight" in run(capsys, "compare", quantized, dense)[1]


def test_chat(quantized, dense, capsys, monkeypatch):
    options = ["--max-new-tokens", 4, "--temperature", 0]
    code, content, _ = run(capsys, "chat", quantized, "--prompt", "Hello", *options, "--json")
    assert code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(quantized), AutoTokenizer.from_pretrained(quantized)
    inputs = tokenizer("Hello", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, 5:]
    assert content["reply"] == tokenizer.decode(written, skip_special_tokens=True)
    lines = iter(["Hello", "/reset", "/what", "", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, shown, error = run(capsys, "chat", quantized, *options)
    assert code == 0
    assert content["reply"].strip() in shown
    assert "(forgotten)" in error
    assert run(capsys, "chat", quantized, "--json")[0] == cli.USAGE


def test_ctrl_c_stops_a_reply_and_not_the_talk(quantized, capsys, monkeypatch):
    from transformers_quip.cli.chat import Talk

    said, say = [], Talk.say

    def interrupted(talk, text, stream=True):
        said.append((text, list(talk.messages)))
        if text == "one":
            talk.messages.append({"role": "user", "content": text})
            raise KeyboardInterrupt
        return say(talk, text, stream)

    lines = iter(["one", "two"])

    def read(prompt=""):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(Talk, "say", interrupted)
    monkeypatch.setattr("builtins.input", read)
    code, _, error = run(capsys, "chat", quantized, "--max-new-tokens", 2)
    assert code == 0
    assert "(stopped)" in error
    assert said == [("one", []), ("two", [])]


def test_what_is_missing_is_named_before_a_model_is_loaded(quantized, capsys, monkeypatch):
    monkeypatch.setattr("transformers_quip.cli.evaluate.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, error = run(capsys, "evaluate", quantized, "--dataset", "no-such-text")
    assert code == cli.UNUSABLE
    assert "'no-such-text' is neither a text file nor one of 'self', 'wikitext2'" in error
    assert run(capsys, "compare", quantized, quantized, "--dataset", "no-such-text")[0] == cli.UNUSABLE
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error = run(capsys, "evaluate", quantized, "--dataset", "wikitext2")
    assert code == cli.UNUSABLE
    assert "pip install 'transformers-quip[data]'" in error
    code, _, error = run(capsys, "evaluate", quantized.parent / "none", "--save", "--dataset", "self")
    assert code == cli.UNUSABLE
    assert "--save needs a folder" in error


def test_convert(golden, tmp_path, capsys):
    out = tmp_path / "native"
    code, content, _ = run(capsys, "convert", golden / "qs_E8P12_t128", out, "--json")
    assert code == 0
    loaded = AutoModelForCausalLM.from_pretrained(golden / "qs_E8P12_t128", dtype=torch.float32)
    assert content["quantized_layers"] == len(quantized_linears(loaded))
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        native = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(native(ids).logits, loaded(ids).logits)
    assert "Converted from a checkpoint of another format" in (out / "README.md").read_text()
    assert run(capsys, "convert", golden / "qs_E8P12_t128", out)[0] == cli.UNUSABLE


def test_help_is_complete_and_quick():
    """Every command, every option with a help text; and no heavy import for any of it (0.7 s of processor time)."""
    for name in cli.commands.list_commands(None):
        command = cli.commands.get_command(click.Context(cli.commands), name)
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (name, parameter.name)
    code = (
        "import resource, sys\nfrom transformers_quip.cli import COMMANDS, main\n"
        "for name in ('', *COMMANDS):\n    main([*name.split(), '--help'])\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'transformers', 'rich', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "print(use.ru_utime + use.ru_stime, heavy, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert all(f"{name} " in result.stdout for name in cli.commands.list_commands(None))
    assert all(f"Usage: transformers-quip {name} " in result.stdout for name in cli.commands.list_commands(None))
    seconds, heavy = result.stderr.split(maxsplit=1)
    assert heavy.strip() == "set()"
    assert float(seconds) < 0.7


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new"

    def stopped():
        with new_folder(path) as work:
            (work / "half").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []
    with new_folder(path) as work:
        (work / "whole").write_text("whole")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["new", "new/whole"]
    assert path.stat().st_mode & 0o777 == 0o777 & ~_umask()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"), new_folder(tmp_path / "file"):
        pass


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_under_optimum(quantized):
    """optimum-cli finds `quip` by its place in the namespace, and everything after it is ours."""
    code = "import sys\nfrom optimum.commands.optimum_cli import main\nmain()\n"
    command = [sys.executable, "-c", code, "quip"]
    result = subprocess.run(
        [*command, "inspect", str(quantized), "--json"], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["quant_method"] == "quip"
    result = subprocess.run([*command, "--help"], env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: optimum-cli quip" in result.stdout
