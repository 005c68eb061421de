"""Fields of requests that say what an answer has to be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from turbolm.errors import RequestError
from turbolm.form import Grammar, GrammarKind


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class JsonSchema(_Part):
    name: str | None = Field(None, max_length=64, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing: the schema says it.")
    definition: dict[str, Any] | None = Field(None, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="Schemas are always kept to.")


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Part):
    """One of these, as vLLM has them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="A context-free grammar, in Lark's notation or llama.cpp's.")
    json_object: bool | None = None


class GrammarFields(_Part):
    """At most one of them says something."""

    response_format: ResponseFormat | None = Field(None, description="JSON, of a schema or of any kind.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer has to be.")
    guided_json: dict[str, Any] | str | None = Field(None, description="A JSON schema.")
    guided_regex: str | None = Field(None, description="A regular expression that all of the answer matches.")
    guided_choice: list[str] | None = Field(None, description="The answer is one of these.")
    guided_grammar: str | None = Field(None, description="A grammar, in Lark's notation or llama.cpp's.")

    def grammar(self) -> Grammar | None:
        """Raises RequestError."""
        found = [grammar for grammar in (self._response_format(), *self._structured(), *self._guided()) if grammar]
        if len(found) > 1:
            names = " and ".join(grammar.parameter for grammar in found)
            raise RequestError(f"{names} both say what the answer has to be: give one", found[1].parameter)
        return found[0] if found else None

    def _response_format(self) -> Grammar | None:
        form = self.response_format
        if form is None:
            return None
        if (form.type == "json_schema") != (form.json_schema is not None):
            raise RequestError(
                "response_format.json_schema goes with the type json_schema, and is needed there", "response_format"
            )
        if form.json_schema is None:
            return _grammar("json", None, "response_format") if form.type == "json_object" else None
        if form.json_schema.definition is None:
            raise RequestError("response_format.json_schema.schema is missing", "response_format")
        return _grammar("json_schema", form.json_schema.definition, "response_format")

    def _structured(self) -> list[Grammar]:
        given, name = self.structured_outputs, "structured_outputs"
        if given is None:
            return []
        found = [_grammar("json", None, name)] if given.json_object else []
        return found + _listed(name, given.json_, given.regex, given.choice, given.grammar)

    def _guided(self) -> list[Grammar]:
        return [
            *_listed("guided_json", self.guided_json, None, None, None),
            *_listed("guided_regex", None, self.guided_regex, None, None),
            *_listed("guided_choice", None, None, self.guided_choice, None),
            *_listed("guided_grammar", None, None, None, self.guided_grammar),
        ]


def _listed(name: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None) -> list[Grammar]:
    kinds: tuple[tuple[GrammarKind, Any], ...] = (
        ("json_schema", schema), ("regex", regex), ("choice", choice), ("ebnf", grammar),
    )  # fmt: skip
    return [_grammar(kind, value, name) for kind, value in kinds if value is not None]


def _grammar(kind: GrammarKind, value: Any, parameter: str) -> Grammar:
    try:
        return Grammar(kind, value, parameter=parameter)
    except RequestError as error:
        raise RequestError(f"{parameter}: {error}", parameter) from None
