"""Writes the tables of the READMEs from benchmarks/results/: python benchmarks/tables.py [--check]"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "en", "README.zh-CN.md": "zh", "docs/benchmarks.md": "en", "docs/cpu_benchmarks.md": "en",
    "docs/quality.md": "en", "docs/quantization.md": "en", "docs/server.md": "en",
}  # fmt: skip
WORDS = {
    "en": {
        "workload": "tokens per second", "ratio": "ratio", "on": "on", "cores": "cores", "row": "workload",
        "peer": "best other engine", "limit": "of the limit",
    },
    "zh": {
        "workload": "每秒词元数", "ratio": "倍数", "on": "机器:", "cores": "核", "row": "测试",
        "peer": "其他引擎最好成绩", "limit": "达到硬件极限的",
    },
}  # fmt: skip


def result(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return data


def has_result(name: str) -> bool:
    return (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


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


#: What the table "llamacpp" shows, as far as it was measured: result, and how llama.cpp's file is called there.
LLAMACPP_ROWS = {
    "cpu_vs_llamacpp_smollm2": "llama.cpp",
    "cpu_vs_llamacpp_smollm2_q4_0": "llama.cpp, Q4_0",
    "cpu_vs_llamacpp_qwen2_5_coder_0_5b_q4_k_m": "llama.cpp",
}


def against_llamacpp() -> str:
    """turbolm beside llama.cpp: the same file, its fastest requantization, another model."""
    lines = ["| model | tokens per second | turbolm | llama.cpp | ratio |", "|---|---|---:|---:|---:|"]
    for name, other in LLAMACPP_ROWS.items():
        if not has_result(name):
            continue
        record = result(name)
        for work, values in record["tokens_per_second"].items():
            ours, theirs, ratio = (values[key]["median"] for key in ("turbolm", "llama.cpp", "ratio"))
            cells = (record["model"], f"{work} (beside {other})", digits(ours), digits(theirs), f"{ratio:.2f}x")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_context() -> str:
    """Decode speed by context (rows) and streams (columns), llama.cpp's in brackets."""
    rows = result("cpu_context")["tokens_per_second"]
    cells = {(row["context"], row["streams"]): row for row in rows}
    contexts, streams = (sorted({key[place] for key in cells}) for place in (0, 1))
    lines = [f"| context | {' | '.join(f'{count} streams' for count in streams)} |", f"|---:|{'---:|' * len(streams)}"]
    for context in contexts:
        found = [cells.get((context, count), {}) for count in streams]
        texts = [digits(row["turbolm"]["median"]) if "turbolm" in row else "" for row in found]
        theirs = [f" ({digits(row['llama.cpp']['median'])})" if "llama.cpp" in row else "" for row in found]
        lines.append(f"| {context:,} | {' | '.join(map(str.__add__, texts, theirs))} |")
    return "\n".join(lines)


def cpu_start() -> str:
    """Seconds from the start of a process to its first token, and its peak memory."""
    record = result("cpu_start")
    lines = ["| | first token, s | import, s | load, s | peak memory, MB |", "|---|---:|---:|---:|---:|"]
    for name, row in record["engines"].items():
        seconds = (f"{row[key]['median']:.2f}" if key in row else "" for key in ("start", "import", "load"))
        peak = f"{row['peak']['median'] / 1e6:.0f}" if "peak" in row else ""
        lines.append(f"| {' | '.join((name, *seconds, peak))} |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Four significant digits, and no fewer than the units."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def gpu_comparison(model: str, language: str) -> str:
    """turbolm on a GPU beside the best of the other engines and the hardware's limit, from gpu_throughput.py."""
    if not has_result(f"gpu_{model}"):
        return "Not measured yet."
    record, words = result(f"gpu_{model}"), WORDS[language]
    heads = (words["row"], "", "turbolm", words["peer"], words["ratio"], words["limit"])
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
    for row in record["rows"]:
        if row["figure"] is None:
            continue  # skipped for want of time
        peer = "" if row["peer"] is None else f"{digits(row['peer_figure'])} ({row['peer']})"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        limit = f"{row['floor_seconds'] / row['seconds']:.0%}"
        lines.append(f"| {row['name']} | {row['unit']} | {digits(row['figure'])} | {peer} | {ratio} | {limit} |")
    machine = record["machine"]
    gpus = machine["gpus"]
    device = machine["cpu"] if not gpus else gpus[0] if len(gpus) == 1 else f"{len(gpus)} {gpus[0]}"
    options = [record.get("model", model.split("_", maxsplit=1)[0]), *record.get("flags", {}).get("option", ())]
    about = f"{', '.join(options)}, {words['on']} {device}, {machine['date'][:10]}"
    return "\n".join([*lines, "", f"<sub>{about}</sub>"])


def gpu_peers(model: str) -> str:
    """What the other engines reached, from data/gpu_peers.json."""
    data = json.loads((ROOT / "benchmarks" / "data" / "gpu_peers.json").read_text())
    rows = data["models"][model]
    engines = [name for name in data["engines"] if any(name in row["figures"] for row in rows.values())]
    lines = [f"| workload | unit | {' | '.join(engines)} |", f"|---|---|{'---:|' * len(engines)}"]
    for name, row in rows.items():
        cells = [digits(row["figures"][engine]) if engine in row["figures"] else "" for engine in engines]
        lines.append(f"| {name} | {row['unit']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quality(name: str) -> str:
    """What compression costs: from quality.py."""
    if not has_result(name):
        return "Not measured yet."
    record = result(name)
    heads = ("weights", "bits per weight", "perplexity", "KL, mean", "KL, 99%", "same likeliest token", "same tokens")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for case, row in record["rows"].items():
        cells = (
            case, f"{row['bits']:.2f}" if "bits" in row else "16", f"{row['perplexity']:.2f}", f"{row['kl_mean']:.4f}",
            f"{row['kl_99']:.3f}", f"{row['same_top_1']:.1%}", f"{row['diverges_after']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    machine = record["machine"]
    device = machine["gpus"][0] if machine.get("gpus") else machine["cpu"]
    about = f"{record['model']}; perplexity of {record['windows']} windows of 512 tokens of {record['text']}; "
    return "\n".join([*lines, "", f"<sub>{about}{device}, {machine['date'][:10]}</sub>"])


def kv_quality(name: str) -> str:
    """What KV formats cost beside the weights' own: perplexity, and the mean KL divergence in brackets."""
    if not has_result(name):
        return "Not measured yet."
    rows = {case: row for case, row in result(name)["rows"].items() if row.get("kv")}
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["kv"]))
    lines = [f"| weights | KV 16 bit | {' | '.join(kinds)} |", f"|---|---:|{'---:|' * len(kinds)}"]
    for case, row in rows.items():
        found = [row, *(row["kv"].get(kind) for kind in kinds)]
        cells = [f"{values['perplexity']:.2f} ({values['kl_mean']:.3f})" if values else "" for values in found]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quantizers(name: str) -> str:
    """turbolm's results beside other tools', from vs_quantizers.py."""
    if not has_result(name):
        return "Not measured yet."
    record = result(name)
    lines = ["| made by | perplexity | KL, mean | same likeliest token | same tokens |", "|---|---:|---:|---:|---:|"]
    for made, row in record["rows"].items():
        figures = (f"{row['perplexity']:.2f}", f"{row['kl_mean']:.4f}", f"{row['same_top_1']:.1%}")
        lines.append(f"| {made} | {' | '.join(figures)} | {row['diverges_after']:.1f} |")
    lines += [f"| {made} | it failed: {reason} | | | |" for made, reason in record["failures"].items()]
    about = f"{record['model']}, groups of {record['group_size']}, the calibration text that comes with turbolm"
    return "\n".join([*lines, "", f"<sub>{about}</sub>"])


def cpu_formats() -> str:
    """Decode speed by weights and KV cache, from cpu_formats.py."""
    if not has_result("cpu_formats"):
        return "Not measured yet."
    record = result("cpu_formats")
    lines = ["| weights and KV cache | tokens per second | beside bf16 |", "|---|---:|---:|"]
    base = record["rows"]["bf16"]["median"]
    for name, row in record["rows"].items():
        lines.append(f"| {name} | {digits(row['median'])} | {row['median'] / base:.2f}x |")
    return "\n".join(
        [*lines, "", f"<sub>{record['model']}, context {record['context']}, {record['machine']['cpu']}</sub>"]
    )


def server_streams() -> str:
    """What the server carries, from server_streams.py: medians of the rounds."""
    record = result("server_streams")
    lines = [
        "| engine | streamed tokens per second | tokens per event | server, µs per token | engine, µs per token |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, name in (("isolated", "in a process of its own"), ("one process", "in the server's")):
        rows = record[title]
        keys = ("tokens_per_second", "tokens_per_event", "front_us_per_token", "engine_us_per_token")
        found = [statistics.median(row[key] for row in rows) if key in rows[0] else None for key in keys]
        cells = [digits(value) if value is not None else "" for value in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = record["machine"]
    about = f"{record['streams']} streams of {record['tokens']} tokens, {machine['cpu']}, {machine['cores']} cores"
    return "\n".join([*lines, "", f"<sub>{about}, {machine['date'][:10]}</sub>"])


def front_ends() -> str:
    """turbolm's server beside others' over engines that compute nothing, from front_ends.py."""
    if not has_result("front_ends"):
        return "Not measured yet."
    record = result("front_ends")
    lines = [
        "| | tokens per second | turbolm's by it | per event | CPU, µs per token | one-token requests per second | "
        "turbolm's by it |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    long, short = (record[title]["medians"] for title in ("long answers", "answers of one token"))
    for name, row in long.items():
        both = ((row, "tokens"), (short[name], "requests"))
        ratios = [found.get(f"turbolm_{key}_per_second_ratio") for found, key in both]
        first, second = ("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
        cells = (
            name, digits(row["tokens_per_second"]), first, f"{row['tokens_per_event']:.1f}",
            f"{row['cpu_us_per_token']:.0f}", digits(short[name]["requests_per_second"]), second,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    machine = record["machine"]
    about = f"{record['streams']} streams of {record['tokens']} tokens, {machine['cpu']}, {machine['cores']} cores"
    return "\n".join([*lines, "", f"<sub>{about}, {machine['date'][:10]}</sub>"])


def convert_start() -> str:
    """Seconds to load, from convert_start.py."""
    if not has_result("convert_start"):
        return "Not measured yet."
    record = result("convert_start")
    lines = ["| weights | as it is, s | converted, s |", "|---|---:|---:|"]
    for weights, row in record["rows"].items():
        lines.append(f"| {weights} | {row['as it is']['median']:.2f} | {row['converted']['median']:.2f} |")
    return "\n".join([*lines, "", f"<sub>{record['model']}, {record['machine']['cpu']}</sub>"])


GPU_MODELS = ("llama-3-8b", "llama-2-7b-awq", "qwen3-0.6b")
GPU_VARIANTS = ("llama-3-8b_2_gpus", "llama-3-8b_kv_int8", "llama-3-8b_kv_int4")
TABLES = {
    **{f"quality-{name}": lambda _, name=name: quality(f"quality_{name}") for name in ("smollm2", "qwen2_5_coder")},
    **{
        f"quality-kv-{name}": lambda _, name=name: kv_quality(f"quality_{name}")
        for name in ("smollm2", "qwen2_5_coder")
    },
    "quantizers": lambda _: quantizers("vs_quantizers_smollm2"),
    "cpu-formats": lambda _: cpu_formats(),
    "convert-start": lambda _: convert_start(),
    "server-streams": lambda _: server_streams(),
    "front-ends": lambda _: front_ends(),
    "llamacpp": lambda _: against_llamacpp(),
    "cpu-context": lambda _: cpu_context(),
    "cpu-start": lambda _: cpu_start(),
    "transformers": lambda language: comparison("vs_transformers", "transformers", language),
    **{f"gpu-{name}": functools.partial(gpu_comparison, name) for name in (*GPU_MODELS, *GPU_VARIANTS)},
    **{f"gpu-peers-{model}": lambda _, model=model: gpu_peers(model) for model in GPU_MODELS},
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
