"""Items put to a loaded model: the null model, which answers everything with lower-case letters."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from turbolm.errors import ConfigError, EngineError
from turbolm.eval.answer import Answer
from turbolm.eval.data import Item, read_item
from turbolm.eval.examination import ExamOptions, Reference, examine, prepare
from turbolm.eval.judge import Judge
from turbolm.eval.probes import PROBES, make_probes
from turbolm.llm import AsyncLLM

OPTIONS = ExamOptions(max_tokens=12)


@pytest.fixture(scope="module")
def null() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("null", max_context=256)
    yield llm
    asyncio.run(llm.close())


def ask(llm: AsyncLLM, items: list[Item], options: ExamOptions = OPTIONS, **more):
    """(answers, distributions) by id."""

    async def run():
        questions, problems = prepare(llm, items, options)
        assert not problems
        return [found async for found in examine(llm, questions, options, **more)]

    found = asyncio.run(run())
    assert len(found) == len({item.id for item, _, _ in found})
    return {item.id: answer for item, answer, _ in found}, {item.id: rest for item, _, rest in found}


def item(line: int = 1, **fields) -> Item:
    return read_item({"id": f"item {line}", **fields}, line, allow_code=True)


def test_answers_are_greedy_scored_and_of_the_length_asked_for(null: AsyncLLM) -> None:
    items = [
        item(1, prompt="abc", check={"kind": "regex", "pattern": "^[a-z]{12}$"}),
        item(2, prompt="abc", reference="XYZ"),
        item(3, messages=[{"role": "user", "content": "abc"}], max_tokens=3),
    ]
    answers, _ = ask(null, items)
    assert [answers[own.id].score for own in items] == [1.0, 0.0, None]
    assert len(answers["item 3"].token_ids) == 3
    assert answers["item 1"].text == answers["item 2"].text
    assert ask(null, items)[0] == answers


def test_agreement_with_itself_is_whole(null: AsyncLLM) -> None:
    items = [
        item(1, prompt="abc"),
        item(2, text="some text of the user"),
        item(3, prompt="a", choices=["b", "c"], reference=0),
    ]
    base, distributions = ask(null, items)
    references = {own.key: Reference(base[own.id], distributions[own.id]) for own in items}
    changed, _ = ask(null, items, references=references)
    assert changed["item 1"].agreement is not None
    assert changed["item 1"].agreement.kl == pytest.approx(0, abs=1e-6)
    assert changed["item 1"].agreement.top1 == 1
    for name in ("item 2", "item 3"):
        assert changed[name].log_likelihoods == pytest.approx(base[name].log_likelihoods)


def test_agreement_is_measured_on_the_bases_answer(null: AsyncLLM) -> None:
    """Told that the base answered something else, the same model finds those tokens unlikely."""
    one = item(1, prompt="abc")
    base, distributions = ask(null, [one])
    other = replace(base["item 1"], token_ids=tuple(98 for _ in base["item 1"].token_ids))
    changed, _ = ask(null, [one], references={one.key: Reference(other, distributions["item 1"])})
    assert changed["item 1"].agreement is not None
    assert changed["item 1"].agreement.kl > 1


def test_the_likeliest_choice_is_the_answer(null: AsyncLLM) -> None:
    """The null model's own continuation is likelier than any other letter."""
    own = ask(null, [item(1, prompt="abc", max_tokens=1)])[0]["item 1"].text
    others = [letter for letter in "xyz" if letter != own]
    answers, _ = ask(null, [item(2, prompt="abc", choices=[*others, own], reference=own)])
    assert (answers["item 2"].text, answers["item 2"].score) == (own, 1.0)


def test_choices_are_compared_per_byte_unless_told_otherwise(null: AsyncLLM) -> None:
    """Every wrong letter costs the same, so the sum favours the shorter choice."""
    fields = {"prompt": "abc", "choices": ["QQ", "QQQ"], "reference": "QQ"}
    plain, _ = ask(null, [item(1, **fields, check={"kind": "choice", "normalize": False})])
    assert plain["item 1"].text == "QQ"
    per_byte, _ = ask(null, [item(1, **fields)])
    assert per_byte["item 1"].log_likelihoods == plain["item 1"].log_likelihoods


def test_what_the_model_cannot_take_is_a_problem_of_that_item(null: AsyncLLM) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    user = {"role": "user", "content": "hi"}
    items = [
        item(1, prompt="fine"),
        item(2, prompt="x" * 250),
        item(3, messages=[user], tools=[tool]),
        item(4, text="x"),
        item(5, prompt="x" * 100, choices=["y" * 200, "z"], reference="z"),
    ]
    questions, problems = prepare(null, items, OPTIONS)
    assert [question.item.line for question in questions] == [1]
    texts = [problems[own.key] for own in items[1:]]
    assert "262 tokens with max_tokens 12 exceed the context of 256" in texts[0]
    assert "no place for tools" in texts[1]
    assert "nothing to predict" in texts[2]
    assert "with its longest choice exceed" in texts[3]


def test_probes_of_a_base_model_are_plain_text(null: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null, "chat_template", None)
    probe = make_probes(("languages",), 1, 0, 10)[0]
    assert not prepare(null, [probe], OPTIONS)[1]
    _, problems = prepare(null, [item(1, messages=[{"role": "user", "content": "hi"}])], OPTIONS)
    assert "no chat template" in next(iter(problems.values()))


def test_long_texts_are_scored_in_windows(null: AsyncLLM) -> None:
    llm = AsyncLLM("null", max_context=1024)
    answers, _ = ask(llm, [item(1, text="once upon a time " * 80)])
    asyncio.run(llm.close())
    assert answers["item 1"].prompt_tokens == 1024
    assert answers["item 1"].note.startswith("perplexity ")


def test_nothing_begins_after_the_deadline(null: AsyncLLM) -> None:
    assert ask(null, [item(1, prompt="abc")], deadline=time.monotonic() - 1)[0] == {}


def test_all_probes_can_be_put(null: AsyncLLM) -> None:
    llm = AsyncLLM("null", max_context=2048)
    probes = make_probes(tuple(kind for kind in PROBES if kind != "tool call"), 1, 0, 60)
    answers, _ = ask(llm, probes)
    asyncio.run(llm.close())
    assert {answer.score for answer in answers.values()} == {0.0}


class JudgeServer:
    """Grades as told; notes what it was asked."""

    def __init__(self, said: list[str]) -> None:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, self.headers.get("Authorization"), body))
                text = said[min(len(server.asked), len(said)) - 1]
                data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(200 if text else 500)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.asked: list[tuple[str, str | None, dict]] = []
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


def judged(null: AsyncLLM, said: list[str]) -> tuple[Answer, JudgeServer]:
    server = JudgeServer(said)
    options = replace(OPTIONS, judge=Judge(server.url, "grader", "secret"))
    one = item(1, prompt="abc{", check={"kind": "judge", "rubric": "Only style counts."}, reference="abd")
    try:
        return ask(null, [one], options)[0]["item 1"], server
    finally:
        server.http.shutdown()


def test_a_judge_grades(null: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answer, server = judged(null, ["no grade", "Good.\nSCORE: 7"])
    assert answer.score == 0.7
    assert answer.note == "judge: Good.\nSCORE: 7"
    path, key, body = server.asked[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "grader")
    for text in ("abc{", "abd", answer.text, "Only style counts."):
        assert text in body["messages"][0]["content"]


@pytest.mark.parametrize(("said", "message"), [(["SCORE: 11"], "gave no score from 0 to 10"), ([""], "answered 500")])
def test_a_judge_that_fails_ends_the_run(
    null: AsyncLLM, monkeypatch: pytest.MonkeyPatch, said: list[str], message: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(EngineError, match=message):
        judged(null, said)


def test_items_for_a_judge_need_one(null: AsyncLLM) -> None:
    with pytest.raises(ConfigError, match="--judge-url"):
        prepare(null, [item(1, prompt="x", check="judge")], OPTIONS)
    with pytest.raises(ConfigError, match="give an address"):
        Judge("localhost:1", "x")
