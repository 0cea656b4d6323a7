"""Files about a device: NAME-VERSION.json in $QUIP_KERNELS_CACHE, or in quip-kernels in the user's cache folder.

Each is for one kind of device and one version of the kernels. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import re
import time
from pathlib import Path

import torch
import triton

VARIABLE = "QUIP_KERNELS_CACHE"
# Writing takes less: an older temporary file is of a process that was killed.
_WRITING_SECONDS = 60


def device_name(device: torch.device) -> str:
    """As the driver calls it; "CPU" where the interpreter stands for a device."""
    if device.type == "cpu":
        return "CPU"
    return torch.xpu.get_device_name(device) if device.type == "xpu" else torch.cuda.get_device_name(device)


@functools.cache
def version() -> str:
    """Of the kernels and of their compiler: results of other versions are not valid."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def file_of(device: torch.device, purpose: str = "") -> Path:
    """The file about this device; `purpose` begins with "-" and ends the name."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quip-kernels"
    else:
        folder = Path(wanted)
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-")
    return folder / f"{name}-{version()}{purpose}.json"


def write(path: Path, content: str) -> None:
    """Write the file as a whole or not at all, while other processes may do the same. The umask decides who may read it.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process has removed it
            if time.time() - left.stat().st_mtime > _WRITING_SECONDS:
                left.unlink()
