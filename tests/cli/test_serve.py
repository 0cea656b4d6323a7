"""serve: what it asks of Transformers' server, how much memory that may take, and the real server over loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.child import environment
from transformers_quip import cli
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.cli import chat, serve
from transformers_quip.cli.serving_memory import Memory, plan

GIGABYTE = 1_000_000_000
missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (transformers-quip[serve])")


@pytest.fixture
def started(monkeypatch):
    """What would be executed: [(arguments behind `transformers serve`, environment variables)]."""
    calls = []
    monkeypatch.setattr(
        serve, "run_loaded", lambda program, arguments, variables: calls.append((program, arguments, variables))
    )
    monkeypatch.setattr(serve, "check_installed", lambda: None)
    return calls


def test_chat_and_serve_share_their_options():
    shared = {"dtype", "device_map", "seed", "revision", "token"}
    of_chat, of_serve = ({option.name: option for option in module.command.params} for module in (chat, serve))
    assert shared <= of_chat.keys() & of_serve.keys()
    for name in shared:
        assert (of_chat[name].opts, of_chat[name].help) == (of_serve[name].opts, of_serve[name].help)


def test_what_is_asked_of_transformers(quantized, started):
    options = ["--port", "8123", "--device-map", "cpu", "--seed", "3", "--dtype", "float32", "--token", "hf_x"]
    assert cli.main(["serve", str(quantized), *options, "--", "--reasoning", "off", "--enable-cors"]) == 0
    ((program, arguments, variables),) = started
    assert program == [sys.executable, "-m", "transformers.cli.transformers", "serve", str(quantized)]
    assert arguments[:10] == ["--host", "localhost", "--port", "8123", "--dtype", "float32", "--device", "cpu",
                              "--default-seed", "3"]  # fmt: skip
    assert "--continuous-batching" in arguments
    assert 0 < float(arguments[arguments.index("--cb-max-memory-percent") + 1]) < 0.5
    assert arguments[-3:] == ["--reasoning", "off", "--enable-cors"]
    assert variables == {"HF_TOKEN": "hf_x"}


def test_one_by_one_and_limits_of_ones_own(quantized, started):
    assert cli.main(["serve", str(quantized), "--one-by-one", "--revision", "v2"]) == 0
    assert not any("batching" in argument or "cb" in argument for argument in started[0][1])
    assert started[0][0][-1] == f"{quantized}@v2"
    assert cli.main(["serve", str(quantized), "--", "--cb-num-blocks", "4"]) == 0
    assert started[1][1].count("--continuous-batching") == 1
    assert started[1][1][-2:] == ["--cb-num-blocks", "4"]
    assert "--cb-max-memory-percent" not in started[1][1]


def test_what_is_not_installed_is_named(quantized, monkeypatch, capsys):
    monkeypatch.setattr(serve, "_NEEDED", {"json": "json", "no_such_module": "no-such-package"})
    assert cli.main(["serve", str(quantized)]) == cli.UNUSABLE
    error = capsys.readouterr().err
    assert "serve needs no-such-package: pip install 'transformers-quip[serve]'" in error


def test_the_list_of_models_needs_the_hubs_cache(quantized, started, monkeypatch, tmp_path, capsys):
    """Transformers 5.23 answers with an error where there is no such folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "new" / "hub"))
    assert cli.main(["serve", str(quantized)]) == 0
    assert (tmp_path / "new" / "hub").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert cli.main(["serve", str(quantized)]) == 0
    assert "/v1/models may not list models" in capsys.readouterr().err
    assert len(started) == 2


def llama_8b(quantized, **changes):
    """Sizes of Llama-3.1-8B, at 2 bits."""
    inventory = read_folder(quantized)
    sizes = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {**inventory.config, **sizes, "head_dim": 128, "vocab_size": 128256, "dtype": "bfloat16", **changes}
    return type(inventory)(config, inventory.tensors, inventory.linears, 3 * GIGABYTE, inventory.names)


@pytest.mark.parametrize(("total", "free"), [(16, 14), (24, 22), (64, 20), (256, 250)])
def test_the_cache_fits_into_half_of_what_is_free(quantized, total, free):
    memory = Memory("cpu", total * GIGABYTE, free * GIGABYTE)
    found = plan(llama_8b(quantized), memory, 32768)
    assert found.bytes <= (free - 4) * GIGABYTE / 2  # 3 GB of weights and 1 GB of the process are taken before
    assert found.share * (total - 4) * GIGABYTE == pytest.approx(found.bytes)
    # keys and values of 32 layers with 8 heads of 128 in 16 bits: 131072 bytes for a token
    assert 131072 * found.tokens < found.bytes
    assert found.tokens <= 32768
    assert found.tokens == 32768 or found.bytes > 0.45 * (free - 4) * GIGABYTE


def test_less_is_asked_for_when_less_is_needed(quantized):
    inventory = llama_8b(quantized)
    memory = Memory("gpu", 80 * GIGABYTE, 79 * GIGABYTE)
    small, large = plan(inventory, memory, 4096), plan(inventory, memory, 32768)
    assert small.tokens == 4096
    assert large.bytes - small.bytes >= 131072 * (32768 - 4096)
    assert small.share == pytest.approx(small.bytes / (76 * GIGABYTE))


def test_where_nothing_fits_it_is_said_before_loading(quantized):
    with pytest.raises(ValueError, match="free some memory, or answer requests with --one-by-one"):
        plan(llama_8b(quantized), Memory("cpu", 16 * GIGABYTE, 5 * GIGABYTE), 32768)
    with pytest.raises(ValueError, match=r"0\.00 GB are free"):
        plan(llama_8b(quantized), Memory("cpu", 16 * GIGABYTE, 1 * GIGABYTE), 32768)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, "x", 0, -5, True, [], 2.5])
def test_a_config_that_does_not_tell(quantized, name, value):
    assert plan(llama_8b(quantized, **{name: value}), Memory("cpu", 64 * GIGABYTE, 60 * GIGABYTE), 32768) is None


@pytest.mark.parametrize("total", [16, 64])
def test_transformers_counts_in_the_same_way(quantized, monkeypatch, total):
    """Its own arithmetic, fed with our share, makes a cache of about as many tokens as we say."""
    from transformers import AutoConfig, ContinuousBatchingConfig
    from transformers.generation.continuous_batching import cache as paged

    handler = getattr(paged, "PagedAttentionMemoryHandler", None)
    if handler is None or not hasattr(handler, "bytes_per_batch_token"):
        pytest.skip("this release of Transformers counts in another way")
    found = plan(llama_8b(quantized), Memory("cpu", total * GIGABYTE, (total - 2) * GIGABYTE), 32768)
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=128256,
    )  # fmt: skip
    config._attn_implementation = "paged|sdpa"
    monkeypatch.setattr(
        paged, "get_device_and_memory_breakdown", lambda: (None, total * GIGABYTE, 4 * GIGABYTE, 4 * GIGABYTE)
    )
    asked = ContinuousBatchingConfig(max_batch_tokens=found.batch_tokens, max_memory_percent=found.share)
    asked.max_requests_per_batch, asked.max_blocks_per_request, asked.use_async_batching = 1024, 0, False
    block = 131072 * 256  # bytes of keys and values of 256 tokens in all layers
    counted = handler(config, asked, torch.bfloat16, block, 256, block, ["full_attention"], True)
    batch, blocks = counted.infer_max_batch_tokens_and_num_sectors()
    assert batch == found.batch_tokens
    assert 0.9 * found.tokens < 256 * blocks < 1.3 * found.tokens
    assert counted.compute_memory_footprint(batch, blocks) <= found.bytes


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ask(port, **body):
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


@pytest.fixture
def talking(quantized, tmp_path):
    """A model with the plainest chat template."""
    folder = tmp_path / "talking"
    shutil.copytree(quantized, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return folder


@pytest.fixture(params=[[], ["--one-by-one"]], ids=["continuous batching", "one by one"])
def server(request, talking, tmp_path):
    """The real server: (port, process id)."""
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "transformers_quip", "serve", talking, "--port", port, "--device-map", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), *request.param], env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 240
        while "Uvicorn running" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield port, process.pid, log
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@needs_server
def test_the_real_server(server, talking):
    port, pid, log = server
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talking), AutoTokenizer.from_pretrained(talking)
    words = ["Hello", "number", "Paragraph", "others"]

    def expected(text):
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    def asked(text):
        body = {"model": str(talking), "messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0}
        return ask(port, **body)["choices"][0]["message"]["content"]

    try:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(asked, words))
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read()[:500]} {log.read_text()[-2000:]}")
    with urllib.request.urlopen(f"http://localhost:{port}/v1/models", timeout=120) as reply:
        assert json.load(reply)["object"] == "list"
    assert replies == [expected(text) for text in words]
    assert "unknown quantization" not in log.read_text().lower()
    if os.path.exists(f"/proc/{pid}/status"):
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert int(peak) < 2_500_000  # Transformers' default would take 0.6 of all memory
