"""llama.cpp for peers.py, in the virtual environment that has it: writes a random model, then computes what it is told.

    python llama_cpp_worker.py TYPE THREADS FOLDER

The model has the sizes of `generate.save_random_llama`. A line "prompt P N" of standard input computes N tokens in one
pass, "generate P N" N tokens one by one after P; the answer is seconds and CPU seconds.
"""

import ctypes
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HIDDEN, INNER, LAYERS, HEADS, GROUPS, VOCABULARY, CONTEXT = 2048, 5632, 8, 32, 8, 32000, 2048
# Places of the float16 scales in a block of each type.
SCALES = {"Q2_K": (80, 82), "IQ2_XXS": (0,), "Q4_0": (0,), "Q6_K": (208,)}


def blocks(rows: int, columns: int, kind: str) -> np.ndarray:
    """A weight of random blocks with scales that keep values small."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(0).integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for place in SCALES[kind]:
        data[:, place : place + 2] = np.array([1e-4], dtype=np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, kind: str) -> None:
    """The model as a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, dtype: str = kind) -> None:
        raw = gguf.GGMLQuantizationType[dtype]
        writer.add_tensor(f"{name}.weight", blocks(rows, columns, dtype), raw_dtype=raw)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))

    add("token_embd", VOCABULARY, HIDDEN)
    add("output", VOCABULARY, HIDDEN, "Q6_K")
    norm("output_norm")
    few = HIDDEN // HEADS * GROUPS
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", few, HIDDEN),
            ("attn_v", few, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            add(f"blk.{i}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    kind, threads, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    path = folder / f"{kind}.gguf"
    write(path, kind)

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        if level == 4:  # an error
            sys.stderr.buffer.write(text)

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = CONTEXT, 512, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp did not load the model")

    def compute(count: int) -> None:
        tokens = (llama_cpp.llama_token * count)(*range(3, 3 + count))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise SystemExit("llama.cpp failed")

    print(llama_cpp.__version__, llama_cpp.llama_print_system_info().decode(), flush=True)
    for line in sys.stdin:
        task, prompt, count = line.split()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start, begin = time.perf_counter(), time.process_time()
        if task == "prompt":
            compute(int(count))
        else:
            compute(int(prompt))
            for _ in range(int(count) - 1):  # the prompt gives the first one
                compute(1)
        print(time.perf_counter() - start, time.process_time() - begin, flush=True)


if __name__ == "__main__":
    main()
