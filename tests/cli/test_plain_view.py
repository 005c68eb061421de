from __future__ import annotations

import io

from turbolm.answer import Answer
from turbolm.cli.plain_view import PlainView
from turbolm.types import Output, ReasoningPart, TextPart, ToolCallPart


def test_plain_view_keeps_reasoning_off_the_answer():
    out, aside = io.StringIO(), io.StringIO()
    view, answer = PlainView(out, aside), Answer()
    for part in (ReasoningPart("hm "), ReasoningPart("yes"), TextPart("The "), TextPart("answer")):
        answer.push(Output("", parts=(part,)))
        view.update(answer)
    for arguments in ('{"a"', ": 1}"):
        answer.push(Output("", parts=(ToolCallPart(0, arguments, None, "look"),)))
        view.update(answer)
    view.finish(answer, "note")
    assert out.getvalue() == 'The answer\nlook({"a": 1})\n'
    assert aside.getvalue() == "hm yes\nnote\n"
