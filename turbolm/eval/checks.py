"""Checks of an answer: what an item may ask for, and the score, 0 to 1, that an answer gets.

One entry per kind in `KINDS`: which options it takes, how its reference is read, how an answer is scored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from turbolm.errors import nearest
from turbolm.eval.expression import compile_expression, evaluate
from turbolm.eval.json_schema import check_schema, mismatch
from turbolm.eval.similarity import ROUGE_VARIANTS, bleu, chrf, missing_package, rouge

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class DataError(ValueError):
    """An item that can't be used; its reader adds the line number."""


class ToolCall(NamedTuple):
    name: str
    arguments: str  # JSON text


class Grade(NamedTuple):
    score: float  # 0 to 1
    note: str = ""  # why, where that isn't plain


@dataclass(frozen=True, slots=True)
class Check:
    kind: str
    reference: Any = None  # as the kind's reader leaves it
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    @property
    def is_log_likelihood(self) -> bool:
        """The answer is the likeliest of the choices; nothing is generated."""
        return self.kind == "choice"

    @property
    def needs_judge(self) -> bool:
        return self.kind == "judge"

    @property
    def shown_reference(self) -> str:
        """What a right answer is, for people."""
        texts = self.reference if isinstance(self.reference, list) else [self.reference]
        if all(isinstance(text, str) for text in texts):
            return " | ".join(texts)
        return json.dumps(self.reference, ensure_ascii=False)

    def grade(self, text: str, calls: Sequence[ToolCall] = ()) -> Grade:
        """The score of an answer (of all kinds but "judge")."""
        return KINDS[self.kind].grade(self, text, calls)


Grader = Callable[[Check, str, Sequence[ToolCall]], Grade]


@dataclass(frozen=True, slots=True)
class Kind:
    grade: Grader
    read: Callable[[Mapping[str, Any]], Any]  # an item's fields → the reference; DataError
    options: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)


def read_check(fields: Mapping[str, Any], *, allow_code: bool) -> Check | None:
    """The check of an item: as its 'check' says, else the one that its other fields suggest. DataError."""
    given = fields.get("check")
    options = dict(given) if isinstance(given, Mapping) else {}
    kind = options.pop("kind", None) if isinstance(given, Mapping) else given
    kind = _suggested(fields) if given is None else kind
    if kind is None:
        return None
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"unknown check {kind!r}.{nearest(str(kind), KINDS)} Known: {', '.join(KINDS)}")
    known = KINDS[kind]
    for name, value in options.items():
        if name not in known.options:
            allowed = ", ".join(known.options) or "none"
            raise DataError(
                f"the check '{kind}' has no option '{name}'.{nearest(name, known.options)} It has: {allowed}"
            )
        if not isinstance(value, known.options[name]):
            raise DataError(f"the option '{name}' of the check '{kind}' can't be {value!r}")
    if kind in ("rouge", "bleu", "chrf") and (package := missing_package(kind)):
        raise DataError(f"the check '{kind}' needs the package {package}: pip install {package}")
    if options.get("variant", "rougeL") not in ROUGE_VARIANTS:
        raise DataError(f"'variant' is {options['variant']!r}; allowed: {', '.join(ROUGE_VARIANTS)}")
    if kind == "python":
        if not allow_code:
            raise DataError("the check 'python' runs code that the data bring; allow it with --allow-code")
        try:
            compile_expression(str(options.get("expression")))
        except SyntaxError as error:
            raise DataError(f"the check's 'expression' is no Python expression: {error.msg}") from None
    reference = known.read({**fields, **options})
    return Check(kind, reference, options, tuple(fields.get("choices") or ()))


def _suggested(fields: Mapping[str, Any]) -> str | None:
    reference = fields.get("reference")
    if fields.get("choices") is not None:
        return "choice"
    if fields.get("schema") is not None:
        return "json_schema"
    if reference is None:
        return None
    if isinstance(reference, (int, float)) and not isinstance(reference, bool):
        return "number"
    if isinstance(reference, list) and reference and isinstance(reference[0], Mapping):
        return "tool_call"
    return "contains"


def _texts(fields: Mapping[str, Any]) -> list[Any]:
    """One text or several, each as good."""
    reference = fields.get("reference")
    texts = reference if isinstance(reference, list) else [reference]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"this check needs a 'reference' that is a text or a list of texts, got {reference!r}")
    return texts


def _pattern(fields: Mapping[str, Any]) -> str:
    pattern = fields.get("pattern", fields.get("reference"))
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise DataError(f"the check 'regex' needs a 'pattern' (or 'reference') that is one: {error}") from None
    return str(pattern)


def _number(fields: Mapping[str, Any]) -> float:
    reference = fields.get("reference")
    found = reference if isinstance(reference, (int, float)) else _last_number(str(reference))
    if isinstance(reference, bool) or found is None or not math.isfinite(found):
        raise DataError(f"the check 'number' needs a 'reference' that is a number, got {reference!r}")
    return float(found)


def _choice(fields: Mapping[str, Any]) -> str:
    choices, reference = fields.get("choices"), fields.get("reference")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError("the check 'choice' needs 'choices': a list of two or more texts")
    if len(set(choices)) < len(choices):
        raise DataError("two of the 'choices' are equal")
    if type(reference) is int and 0 <= reference < len(choices):
        return str(choices[reference])
    if reference not in choices:
        raise DataError(f"the 'reference' must be one of the 'choices', or its number from 0, got {reference!r}")
    return str(reference)


def _schema(fields: Mapping[str, Any]) -> Any:
    if fields.get("schema") is None:
        raise DataError("the check 'json_schema' needs a 'schema'")
    problem = check_schema(fields["schema"])
    if problem:
        raise DataError(problem)
    return fields["schema"]


def _calls(fields: Mapping[str, Any]) -> list[Any]:
    reference = fields.get("reference")
    calls = reference if isinstance(reference, list) else [reference]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or set(call) - {"name", "arguments"}:
            raise DataError(
                "the check 'tool_call' needs a 'reference' of {\"name\": …, \"arguments\": {…}}, or several"
            )
        if not isinstance(call.get("arguments", {}), Mapping):
            raise DataError(f"the arguments of the reference's call '{call['name']}' must be an object")
    if not fields.get("tools"):
        raise DataError("the check 'tool_call' needs the 'tools' that the model may call")
    return calls


def _expression(fields: Mapping[str, Any]) -> Any:
    return fields.get("reference")


def _rubric(fields: Mapping[str, Any]) -> Any:
    reference = fields.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"the check 'judge' takes a 'reference' that is a text, got {reference!r}")
    return reference


def _folded(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


def _exact_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    """Equal but for white space."""
    fold = bool(check.options.get("ignore_case", False))
    return Grade(float(any(_folded(text, fold) == _folded(wanted, fold) for wanted in check.reference)))


def _contains_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    fold = bool(check.options.get("ignore_case", True))
    return Grade(float(any(_folded(wanted, fold) in _folded(text, fold) for wanted in check.reference)))


def _regex_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    flags = re.IGNORECASE if check.options.get("ignore_case", False) else 0
    return Grade(float(re.search(check.reference, text, flags) is not None))


def _number_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    """The last number of the answer."""
    found = _last_number(text)
    if found is None:
        return Grade(0.0, "no number in the answer")
    tolerance = max(check.options.get("tolerance", 0.0), check.options.get("relative", 0.0) * abs(check.reference))
    tolerance += 1e-9 * max(1.0, abs(check.reference))  # what rounding to binary takes
    return Grade(float(abs(found - check.reference) <= tolerance), f"the answer's last number is {found:g}")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _choice_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    return Grade(float(text == check.reference))


def _schema_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    """The whole answer is JSON, or its one fenced block is."""
    fenced = _FENCED.findall(text)
    try:
        value = json.loads(fenced[0] if len(fenced) == 1 else text)
    except (ValueError, RecursionError) as error:
        return Grade(0.0, f"not JSON: {error}")
    problem = mismatch(value, check.reference)
    return Grade(float(problem is None), problem or "")


def _tool_call_grade(check: Check, _text: str, calls: Sequence[ToolCall]) -> Grade:
    """The same calls with equal arguments, in any order."""
    if not calls:
        return Grade(0.0, "no tool call")
    try:
        found = [{"name": call.name, "arguments": json.loads(call.arguments or "{}")} for call in calls]
    except (ValueError, RecursionError) as error:
        return Grade(0.0, f"arguments that aren't JSON: {error}")
    wanted = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in check.reference]

    def ordered(calls: Sequence[Mapping[str, Any]]) -> list[str]:
        return sorted(json.dumps(call, sort_keys=True) for call in calls)

    same = ordered(found) == ordered(wanted)
    return Grade(float(same), "" if same else "other calls than wanted")


def _rouge_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    return Grade(rouge(text, check.reference, check.options.get("variant", "rougeL")))


def _bleu_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    return Grade(bleu(text, check.reference))


def _chrf_grade(check: Check, text: str, _calls: Sequence[ToolCall]) -> Grade:
    return Grade(chrf(text, check.reference))


def _python_grade(check: Check, text: str, calls: Sequence[ToolCall]) -> Grade:
    names = {"answer": text, "reference": check.reference, "tool_calls": [call._asdict() for call in calls]}
    return Grade(*evaluate(str(check.options["expression"]), names))


def _judge_grade(_check: Check, _text: str, _calls: Sequence[ToolCall]) -> Grade:
    raise AssertionError("the judge is asked by eval.judge")


KINDS: Mapping[str, Kind] = {
    "exact": Kind(_exact_grade, _texts, {"ignore_case": bool}),
    "contains": Kind(_contains_grade, _texts, {"ignore_case": bool}),
    "regex": Kind(_regex_grade, _pattern, {"pattern": str, "ignore_case": bool}),
    "number": Kind(_number_grade, _number, {"tolerance": (int, float), "relative": (int, float)}),
    "choice": Kind(_choice_grade, _choice, {"normalize": bool}),
    "json_schema": Kind(_schema_grade, _schema),
    "tool_call": Kind(_tool_call_grade, _calls),
    "rouge": Kind(_rouge_grade, _texts, {"variant": str}),
    "bleu": Kind(_bleu_grade, _texts),
    "chrf": Kind(_chrf_grade, _texts),
    "python": Kind(_python_grade, _expression, {"expression": str}),
    "judge": Kind(_judge_grade, _rubric, {"rubric": str}),
}
