"""Triton's interpreter for tests: import this before any kernel, in a process that uses kernels in no other way."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, *scope):
    """NumPy 2.4 converts only arrays without dimensions to integers; Triton has loop bounds of shape [1].

    Triton 3.6 gives a scope, which restores the old value; Triton 3.5 sets attributes for good.
    """
    _patch_tensor(tensor, *scope)
    set_attr = scope[0].set_attr if scope else setattr
    set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index
