"""Runs Triton's kernels in its interpreter, on the CPU. `TRITON_INTERPRET=0` runs them on a GPU instead."""

from __future__ import annotations

import os

# Triton reads it when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: object, scope: interpreter._LangPatchScope) -> None:
    """Triton 3.6 makes loop bounds of its interpreted scalars, which are arrays of one element, by a conversion
    that NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index
