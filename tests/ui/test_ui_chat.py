"""What the page does, without a page: the null model, and a toy server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from turbolm.llm import AsyncLLM
from turbolm.remote import RemoteLLM
from turbolm.types import SamplingParams
from turbolm.ui.chat import Chat
from turbolm.ui.controls import NAMES
from turbolm.ui.history import question, text_of

GREEDY = SamplingParams(temperature=0)


def values(**given):
    return [given.get(name, "") for name in NAMES]


def null(**options):
    return AsyncLLM("null", progress=False, max_context=20_000, **options)


async def last(chat, text, **given):
    return [update async for update in chat.answer([question(text)], "", values(**given))][-1]


def run(make, main):
    """`main(chat)`, with an engine that is closed afterwards."""

    async def whole():
        engine = make()
        try:
            return await main(Chat(engine, GREEDY)), engine
        finally:
            await engine.close()

    return asyncio.run(whole())


def test_an_answer_grows_and_ends_with_its_figures():
    async def main(chat):
        return [update async for update in chat.answer([question("hi")], "", values(max_tokens="3000"))]

    updates, engine = run(null, main)
    texts = [text_of(rows[-1]) for rows, _ in updates if len(rows) == 2]
    assert len(texts) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(texts[-1]) == 3000
    assert updates[-1][1].startswith("3000 tokens, ")
    assert "max_tokens: 3000" in updates[-1][1]
    assert engine.stats.num_used_blocks == 0


def test_parameters_of_the_page_are_used():
    async def main(chat):
        return (await last(chat, "hi", max_tokens="5"))[0], (await last(chat, "hi", max_tokens="9", stop="w"))[0]

    (five, stopped), _ = run(null, main)
    assert len(text_of(five[-1])) == 5
    assert "w" not in text_of(stopped[-1])


def test_leaving_in_mid_answer_frees_the_request():
    async def main(chat):
        async with contextlib.aclosing(chat.answer([question("hi")], "", values())) as updates:
            async for rows, _ in updates:
                if len(rows) == 2:
                    assert chat.engine.stats.num_used_blocks > 0
                    break
        for _ in range(100):
            if not chat.engine.stats.num_used_blocks:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the request goes on")

    run(null, main)


def test_errors_are_rows():
    async def main(chat):
        bad = await last(chat, "hi", temperature="hot")
        long = await last(chat, "x" * 30_000)
        limit = await last(chat, "hi", top_p="7")
        good = await last(chat, "hi", max_tokens="4")
        return bad, long, limit, good

    (bad, long, limit, good), _ = run(null, main)
    assert "temperature is &#x27;hot&#x27;" in text_of(bad[0][-1])
    assert "exceeds the context of 20000 tokens" in text_of(long[0][-1])
    assert "top_p must be" in text_of(limit[0][-1])
    assert len(text_of(good[0][-1])) == 4


def test_what_nobody_foresaw_is_logged_and_told_without_details(caplog):
    class Broken:
        model_name = "broken"
        default_params = GREEDY

        async def chat(self, messages, params=None):
            raise ZeroDivisionError("secret")
            yield

        async def close(self):
            pass

        @property
        def config(self):
            return type("Limits", (), {"max_context": 0})

    (rows, _), _ = run(Broken, lambda chat: last(chat, "hi"))
    assert "something went wrong" in text_of(rows[-1])
    assert "secret" not in text_of(rows[-1])
    assert "an answer failed" in caplog.text


def test_several_at_once_do_not_mix():
    async def main(chat):
        texts = [f"question {i}" for i in range(12)]
        alone = [await last(chat, text, max_tokens="30") for text in texts[:2]]
        together = await asyncio.gather(*(last(chat, text, max_tokens="30") for text in texts))
        return alone, together

    (alone, together), _ = run(null, main)
    assert [rows for rows, _ in alone] == [rows for rows, _ in together[:2]]
    assert [text_of(rows[0]) for rows, _ in together] == [f"question {i}" for i in range(12)]


def test_a_server_gets_only_what_was_given(toy):
    async def main():
        engine = RemoteLLM(toy.url)
        chat = Chat(engine, engine.default_params, {"top_k": 0, "ignore_eos": False})
        await last(chat, "hello", temperature="1", top_k="0")
        await last(chat, "hello")
        return await last(chat, "refuse"), await last(chat, "break"), await last(chat, "think")

    refused, broken, thought = asyncio.run(main())
    first, second = toy.bodies[:2]
    assert (first["temperature"], first["top_k"], first["ignore_eos"]) == (1.0, 0, False)
    assert "temperature" not in second
    assert "top_k" not in second
    assert "this prompt is refused" in text_of(refused[0][-1])
    assert text_of(broken[0][-2]).startswith("You said")
    assert "This didn't work" in text_of(broken[0][-1])
    assert [text_of(row) for row in thought[0]] == ["think", "First I consider. Then I decide. ", "Decided."]
    assert thought[0][1]["metadata"]["title"] == "Thoughts"


def test_a_server_that_is_left_in_mid_answer_hears_of_it(toy):
    async def main():
        chat = Chat(RemoteLLM(toy.url), SamplingParams())
        async with contextlib.aclosing(chat.answer([question("slow")], "", values())) as updates:
            async for rows, _ in updates:
                if len(rows) == 2:
                    break

    asyncio.run(main())
    assert toy.hung_up.wait(10)


def test_without_a_question_nothing_changes():
    async def main(chat):
        rows = (await last(chat, "hi", max_tokens="4"))[0]
        return rows, [update async for update in chat.answer(rows, "", values())], await anext(chat.answer([], "", []))

    (rows, same, none), _ = run(null, main)
    assert same == [(rows, "")]
    assert none == ([], "")
