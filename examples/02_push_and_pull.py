"""Push a quantized model to a Hub, pull it again into an empty cache, and compare every byte and every logit.

    python examples/02_push_and_pull.py FOLDER OWNER/NAME [--private] [--revision BRANCH]

FOLDER is the output of example 01. You need a token with write access (`hf auth login`, or HF_TOKEN) and, for a Hub of your
own, HF_ENDPOINT. The tests run this file against a Hub on the loopback interface: `python tests/loopback_hub.py` starts it
and prints the variables to set.

Output for a tiny model, with `--shard-size 40KB`:

    pushed to owner/tiny-2bit at e32f1e91
      config.json                                     1,794 bytes
      generation_config.json                            216 bytes
      model-00001-of-00003.safetensors               32,888 bytes
      model-00002-of-00003.safetensors               40,984 bytes
      model-00003-of-00003.safetensors               20,440 bytes
      model.safetensors.index.json                    3,883 bytes
    pulled 7 files: every byte is the same
    logits: identical
    load it with:
        import transformers_quip
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("owner/tiny-2bit")
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_quip  # noqa: F401 - makes Transformers understand quantized models


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a quantized model")
    parser.add_argument("repo", help="where to push it: owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="push to this branch")
    parser.add_argument("--shard-size", default="5GB", help="largest size of the pushed files")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    commit = model.push_to_hub(
        options.repo, private=options.private, revision=options.revision, max_shard_size=options.shard_size
    )
    AutoTokenizer.from_pretrained(options.folder).push_to_hub(options.repo, revision=options.revision)
    print(f"pushed to {options.repo} at {commit.oid[:8]}")

    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as again:
        # an empty cache, so that everything really comes over the network
        pulled = Path(snapshot_download(options.repo, revision=options.revision, cache_dir=cache))
        model.save_pretrained(again, max_shard_size=options.shard_size)
        count = 0
        for path in sorted(Path(again).iterdir()):
            if path.name != "README.md":  # on the Hub it names the repository
                print(f"  {path.name:<40} {path.stat().st_size:>12,} bytes")
                if path.read_bytes() != (pulled / path.name).read_bytes():
                    raise SystemExit(f"{path.name} is not the same")
            count += 1
        print(f"pulled {count} files: every byte is the same")

        reloaded = AutoModelForCausalLM.from_pretrained(options.repo, revision=options.revision, cache_dir=cache).eval()
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            same = torch.equal(model(ids).logits, reloaded(ids).logits)
        if not same:
            raise SystemExit("the logits differ")
        print("logits: identical")
    print("load it with:")
    print("    import transformers_quip")
    print("    from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{options.repo}")')


if __name__ == "__main__":
    main(arguments())
