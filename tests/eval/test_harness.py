"""lm-evaluation-harness on the null model: its interface, and tasks of one's own run through it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from turbolm.cli.main import main
from turbolm.errors import ConfigError
from turbolm.eval import harness
from turbolm.eval.harness import HarnessModel, sampling
from turbolm.llm import LLM
from turbolm.types import SamplingParams


@pytest.fixture(scope="module")
def adapter() -> Iterator[HarnessModel]:
    with LLM("null", progress=False, max_context=256) as llm:
        yield HarnessModel(llm)


def asked(kind: str, *rows: tuple) -> list[Instance]:
    return [Instance(kind, {}, row, number) for number, row in enumerate(rows)]


def test_the_likelihood_of_a_continuation(adapter: HarnessModel) -> None:
    own = adapter.llm.generate("abc", SamplingParams(temperature=0, max_tokens=4))[0].text
    (scored,) = adapter.llm.score(f"abc{own}")
    (value, is_greedy), (other, is_other_greedy) = adapter.loglikelihood(
        asked("loglikelihood", ("abc", own), ("abc", "QQQQ"))
    )
    assert (is_greedy, is_other_greedy) == (True, False)
    assert value == pytest.approx(math.fsum(p or 0.0 for p in scored.logprobs[-len(own) :]))
    assert other < value


def test_an_empty_context_and_spaces_between(adapter: HarnessModel) -> None:
    rows = asked("loglikelihood", ("", "abc"), ("ab ", "c"), ("ab", " c"))
    (empty, _), first, second = adapter.loglikelihood(rows)
    assert first == second  # the space is the continuation's
    assert math.isfinite(empty)


def test_a_text_longer_than_the_context_is_scored_whole(adapter: HarnessModel) -> None:
    whole, short = adapter.loglikelihood_rolling(asked("loglikelihood_rolling", ("a" * 600,), ("a",)))
    assert math.isfinite(whole)
    assert whole < short < 0


def test_answers_end_at_the_stops_and_prompts_are_cut(adapter: HarnessModel) -> None:
    options = {"until": [], "max_gen_toks": 9, "do_sample": False}
    (text,) = adapter.generate_until(asked("generate_until", ("abc", options)))
    assert len(text) == 9
    stopped = {**options, "until": [text[3]]}
    (cut,) = adapter.generate_until(asked("generate_until", ("abc", stopped)))
    assert cut == text[: text.index(text[3])]
    before = adapter.num_cut
    assert len(adapter.generate_until(asked("generate_until", ("x" * 300, options)))[0]) == 9
    assert adapter.num_cut == before + 1


def test_options_of_the_harness() -> None:
    assert sampling({"until": "x", "temperature": 0.7}).temperature == 0.7
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling({"do_sample": True}).temperature == 1
    assert sampling({"max_gen_toks": 5, "until": ["a", ""]}) == SamplingParams(temperature=0, max_tokens=5, stop=("a",))
    with pytest.raises(ConfigError, match="'num_beams', which turbolm doesn't have"):
        sampling({"num_beams": 4})


TASKS = {
    "mine_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
    "mine_text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 3
metric_list:
  - metric: exact_match
""",
    "mine_reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: byte_perplexity
""",
}


@pytest.fixture
def folder(tmp_path: Path, adapter: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files over four questions, of which the null model answers three as wanted."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = ["one", "two", "three", "four"]
    found = adapter.llm.generate(questions, SamplingParams(temperature=0, max_tokens=3))
    rows = [
        {"question": question, "choices": ["QQQ", completion.text], "answer": int(question != "two")}
        for question, completion in zip(questions, found, strict=True)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}")
    return tmp_path


def test_tasks_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "scores.json"
    command = ["eval", "null", "--lm-eval-folder", str(folder), "--max-context", "256", "--json", str(output)]
    assert main([*command, *(word for task in TASKS for word in ("--lm-eval", task))]) == 0
    record = json.loads(output.read_text())
    values = {(row["task"], row["metric"]): row["value"] for row in record["scores"]}
    assert values["mine_choice", "acc"] == 0.75
    assert values["mine_text", "exact_match"] == 0.75
    assert values["mine_reading", "byte_perplexity"] > 1
    assert {row["num_items"] for row in record["scores"]} == {4}
    assert any(line.split()[:2] == ["mine_choice", "acc"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lm-eval", "no_such_task_at_all"], "has no task 'no_such_task_at_all'"),
        (["--lm-eval", "arc_easy", "--data", "examples"], "brings its own questions"),
    ],
)
def test_what_cannot_be_used(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = functools.partial(harness.TaskManager, include_defaults=False)  # to read all of them takes long
    monkeypatch.setattr(harness, "TaskManager", few)
    assert main(["eval", "null", *arguments]) == 2
    assert message in capsys.readouterr().err
