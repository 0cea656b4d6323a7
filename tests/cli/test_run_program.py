"""Other programs load the package, and so do the processes that they start."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.cli.child import environment
from transformers_quip import cli
from transformers_quip.cli.run_program import find_program, startup_folder

# A stranger's program: it has never heard of this package, and asks Transformers' registry.
PROGRAM = """
import json, os, subprocess, sys
import multiprocessing as mp

def child(queue):
    queue.put(known())

def known():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    return "quip" in AUTO_QUANTIZATION_CONFIG_MAPPING

if __name__ == "__main__":
    early = "transformers" in sys.modules or "transformers_quip" in sys.modules or "torch" in sys.modules
    found = {"early": early, "arguments": sys.argv[1:], "here": known()}
    queue = mp.get_context("spawn").Queue()
    process = mp.get_context("spawn").Process(target=child, args=(queue,))
    process.start()
    found["spawned"] = queue.get(timeout=120)
    process.join()
    if "--inner" not in sys.argv:
        command = [sys.executable, __file__, "--inner"]
        found["started"] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["here"]
    print(json.dumps(found))
"""


def run(*arguments, **variables):
    command = [sys.executable, "-m", "transformers_quip", "run", *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "strangers_program.py"
    path.write_text(PROGRAM)
    return path


def test_a_program_and_its_processes(program):
    result = run(program, "-m", "--model", "x", "--help", "--")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["arguments"] == ["-m", "--model", "x", "--help", "--"]
    assert found["here"] is found["spawned"] is found["started"] is True
    assert found["early"] is False  # nothing is imported that the program has not asked for


def test_a_program_that_asks_whether_transformers_is_installed(tmp_path):
    """As accelerate, PEFT and TRL do: what they find then is not what they import later."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom importlib.util import find_spec\n"
        "places = [find_spec('transformers').origin for _ in range(2)]\n"
        "assert find_spec('transformers').loader.is_package('transformers')\n"
        "import transformers\n"
        "assert places == [transformers.__file__] * 2\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "print('quip' in AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "from sitecustomize import _LoadsQuip\n"
        "assert not [finder for finder in sys.meta_path if isinstance(finder, _LoadsQuip)]\n"
    )
    result = run(script)
    assert result.stdout == "True\n", result.stderr


def test_without_run_it_is_not_known(program):
    result = subprocess.run(
        [sys.executable, program, "--inner"], env=environment(), capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["here"] is False


def test_a_module(program):
    result = run("-m", "strangers_program", "--inner", PYTHONPATH=os.pathsep.join([str(program.parent), *sys.path]))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["here"] is True


def test_a_program_on_the_path(program, tmp_path):
    """Also a script of a shell: what counts is the Python that it starts."""
    script = tmp_path / "harness"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    script.chmod(0o755)
    result = run("--", "harness", "--inner", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["here"] is True
    assert find_program(str(script)) == [str(script)]


def test_exit_codes_and_signals_are_the_programs_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(7)")
    assert run(script).returncode == 7
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert run(script).returncode == -signal.SIGTERM
    script.write_text("import os; print(os.getpid())")
    command = [sys.executable, "-m", "transformers_quip", "run", str(script)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == f"{process.pid}\n"  # no process between


def test_what_cannot_be_run(capsys):
    assert cli.main(["run", "no-such-program", "--option"]) == cli.UNUSABLE
    assert "program 'no-such-program' is not on PATH" in capsys.readouterr().err
    assert cli.main(["run"]) == cli.USAGE
    assert cli.main(["run", "--print-path"]) == 0
    assert capsys.readouterr().out == f"{startup_folder()}\n"
    assert (startup_folder() / "sitecustomize.py").is_file()


def test_another_sitecustomize_is_run_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['ANOTHER'] = 'ran'")
    script = tmp_path / "script.py"
    script.write_text("import os, transformers, sys; print(os.environ['ANOTHER'], 'transformers_quip' in sys.modules)")
    result = run(script, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert result.stdout == "ran True\n", result.stderr


def test_a_python_without_the_package_says_so(tmp_path):
    """Not silence and random weights."""
    (tmp_path / "transformers.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("print('started')\nimport transformers\n")
    bare = {**environment(), "PYTHONPATH": os.pathsep.join([str(startup_folder()), str(tmp_path)])}
    result = subprocess.run([sys.executable, "-S", "-c", "import site, sitecustomize; exec(open('script.py').read())"],
                            cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)  # fmt: skip
    assert result.stdout == "started\n"
    assert result.returncode == 1
    assert "install transformers-quip for that Python" in result.stderr


def test_transformers_own_command_line():
    """It starts in the same way for `serve`, which test_serve.py tries."""
    pytest.importorskip("typer")
    result = run("-m", "transformers.cli.transformers", "version")
    assert result.returncode == 0, result.stderr
    import transformers

    assert transformers.__version__ in result.stdout


LAUNCHED = """
import json, os, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
names = sorted({type(module).__name__ for module in model.modules() if "Quip" in type(module).__name__})
print(json.dumps({"rank": os.environ.get("RANK", "0"), "quip": names}), flush=True)
"""


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers(quantized, tmp_path, launcher):
    """Processes that another package's launcher starts: each loads a quantized model."""
    name = shutil.which(launcher, path=os.path.dirname(sys.executable))
    if name is None:
        pytest.skip(f"{launcher} is not installed")
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED)
    options = {
        # on a CPU, several processes of accelerate need MPI
        "accelerate": ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
                       "--dynamo_backend", "no", "--main_process_port", "29613"],
        "torchrun": ["--nproc_per_node", "2", "--master_port", "29614"],
    }[launcher]  # fmt: skip
    result = run(launcher, *options, script, quantized)
    assert result.returncode == 0, result.stderr
    said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [entry["quip"] for entry in said] == [["QuipLinear"]] * len(said)
    assert {entry["rank"] for entry in said} == ({"0", "1"} if launcher == "torchrun" else {"0"})


@pytest.mark.slow
def test_an_evaluation_harness(quantized, tmp_path):
    """EleutherAI's, on a task of our own (it must not reach for the network)."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [{"query": "aaaa", "choices": ["b", "c"], "gold": 0}] * 4
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: " + str(tmp_path / "data.json") + "}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc}]\n"
    )
    arguments = ["--model", "hf", "--model_args", f"pretrained={quantized}", "--tasks", "tiny", "--include_path", tmp_path]
    result = run("-m", "lm_eval", *arguments, "--device", "cpu", "--output_path", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "acc" in result.stdout
    assert "Unknown quantization" not in result.stderr


@pytest.mark.slow
def test_a_trainers_command_line(quantized, tmp_path):
    """TRL's, which starts accelerate's launcher, which starts the script: an adapter is trained on the quantized model."""
    pytest.importorskip("trl", reason="trl is not installed")
    (tmp_path / "data").mkdir()
    rows = [{"text": f"number {row} and others"} for row in range(8)]
    (tmp_path / "data" / "train.json").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model_name_or_path", quantized, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out",
               "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2",
               "--max_length", "16", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--report_to", "none",
               "--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False",
               "--cpu", "--num_processes", "1"]  # fmt: skip
    result = run("trl", "sft", *options, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-4000:]
    losses = [float(found) for found in re.findall(r"'loss': '?([0-9.]+)", result.stdout)]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    assert "Unknown quantization" not in result.stderr
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # they begin as zeros
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(quantized)
