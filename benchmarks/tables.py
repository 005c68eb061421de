"""Writes the tables of the READMEs from benchmarks/results/: python benchmarks/tables.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "en", "README.zh-CN.md": "zh"}
WORDS = {
    "en": {"workload": "tokens per second", "ratio": "ratio", "on": "on", "cores": "cores"},
    "zh": {"workload": "每秒词元数", "ratio": "倍数", "on": "机器:", "cores": "核"},
}


def result(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return data


def comparison(name: str, other: str, language: str) -> str:
    """turbolm beside another engine: medians, and the median of the rounds' ratios."""
    record, words = result(name), WORDS[language]
    lines = [f"| {words['workload']} | turbolm | {other} | {words['ratio']} |", "|---|---:|---:|---:|"]
    for work, values in record["tokens_per_second"].items():
        ours, theirs, ratio = (values[key]["median"] for key in ("turbolm", other, "ratio"))
        lines.append(f"| {work} | {ours:,.0f} | {theirs:,.0f} | {ratio:.1f}x |")
    machine = record["machine"]
    model = record.get("model") or "SmolLM2-135M, float32"
    about = f"{model}, {words['on']} {machine['cpu']}, {machine['cores']} {words['cores']}, {machine['date'][:10]}"
    return "\n".join([*lines, "", f"<sub>{about}</sub>"])


TABLES = {
    "llamacpp-smollm2": lambda language: comparison("cpu_vs_llamacpp_smollm2", "llama.cpp", language),
    "transformers": lambda language: comparison("vs_transformers", "transformers", language),
}


def filled(text: str, language: str) -> str:
    """The page with every `<!-- table NAME -->` … `<!-- end -->` filled."""
    return re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]](language)}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    for page, language in PAGES.items():
        path = ROOT / page
        old = path.read_text()
        new = filled(old, language)
        if "--check" in sys.argv and new != old:
            sys.exit(f"{page} differs from benchmarks/results: run python benchmarks/tables.py")
        path.write_text(new)


if __name__ == "__main__":
    main()
