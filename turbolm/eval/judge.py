"""A model that grades answers, at the URL of an OpenAI-compatible server."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx

from turbolm.errors import ConfigError, EngineError
from turbolm.eval.checks import Check, Grade

_INSTRUCTION = """You grade an answer to a question. Be strict: only what the answer says counts.
{rubric}
[Question]
{question}
{reference}
[Answer]
{answer}

[Grade]
Write one line of reasoning, and then a last line "SCORE: n" with n from 0 (useless or wrong) to 10 (perfect)."""
_RUBRIC = "Judge whether it is correct, complete and to the point."
_SCORE = re.compile(r"SCORE:\s*(\d+(?:\.\d+)?)")
_TEMPERATURES = (0.0, 0.5, 1.0)  # of one attempt after the other


@dataclass(frozen=True, slots=True)
class Judge:
    url: str
    """With or without /v1."""
    model: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the judge's url is '{self.url}'; give an address such as http://127.0.0.1:8000")

    async def grade(self, client: httpx.AsyncClient, check: Check, question: str, answer: str) -> Grade:
        """EngineError where the judge can't be reached; an answer of it without a score is asked for again."""
        reference = f"\n[A right answer]\n{check.reference}\n" if check.reference else ""
        text = _INSTRUCTION.format(
            rubric=check.options.get("rubric", _RUBRIC), question=question, reference=reference, answer=answer
        )
        said = ""
        for temperature in _TEMPERATURES:
            said = await self._ask(client, text, temperature)
            found = _SCORE.findall(said)
            if found and float(found[-1]) <= 10:
                return Grade(float(found[-1]) / 10, f"judge: {said.strip()}")
        raise EngineError(
            f"the judge {self.model} gave no score from 0 to 10 in {len(_TEMPERATURES)} attempts, but: {said[:200]}"
        )

    async def _ask(self, client: httpx.AsyncClient, text: str, temperature: float) -> str:
        base = self.url.rstrip("/")
        url = f"{base if base.endswith('/v1') else f'{base}/v1'}/chat/completions"
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": temperature}
        try:
            response = await client.post(url, json=body, headers=headers)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])
        except httpx.HTTPStatusError as error:
            raise EngineError(
                f"the judge at {url} answered {error.response.status_code}: {error.response.text[:200]}"
            ) from None
        except httpx.HTTPError as error:
            raise EngineError(f"can't reach the judge at {url} ({error or type(error).__name__})") from None
        except (ValueError, LookupError, TypeError):
            raise EngineError(f"{url} isn't an OpenAI-compatible server: its answer holds no message") from None
