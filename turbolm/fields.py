"""What the fields of the configuration dataclasses are for: their docstrings, as help for flags and pages."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_help(cls: type) -> dict[str, str]:
    """Field → the string that follows it in the class body, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts
