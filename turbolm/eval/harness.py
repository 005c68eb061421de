"""Tasks of lm-evaluation-harness on a turbolm model: its `LM` interface, and a run of it.

Token log-likelihoods are of prompt and continuation encoded together, as the harness does for its own models.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import utils as harness_utils  # type: ignore[import-untyped, unused-ignore]
from lm_eval.api.instance import Instance  # type: ignore[import-untyped, unused-ignore]
from lm_eval.api.model import LM  # type: ignore[import-untyped, unused-ignore]
from lm_eval.evaluator import evaluate  # type: ignore[import-untyped, unused-ignore]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, unused-ignore]
from rich.console import Console
from rich.table import Table

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError, nearest
from turbolm.llm import LLM
from turbolm.types import Completion, SamplingParams

logger = logging.getLogger(__name__)

_RESAMPLES = 1000  # for standard errors that have no formula
_MAX_TOKENS = 256  # of a generated answer, where the task says nothing
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_Encoded = tuple[list[int], list[int]]  # what is given, what is scored


class HarnessModel(LM):  # type: ignore[misc]
    """A model as the harness asks it."""

    def __init__(self, llm: LLM, *, is_chat: bool = False) -> None:
        """`is_chat`: prompts are conversations that `apply_chat_template` has made a text of."""
        super().__init__()
        self.llm = llm
        self._is_chat = is_chat
        self.num_cut = 0
        """Prompts whose beginning was left out, since they exceed the context."""

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self.llm.model_name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source; empty: none is used."""
        template = self.llm.chat_template
        return template.source if template is not None and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. ConfigError where the model has no template."""
        if self.llm.chat_template is None:
            raise ConfigError(f"'{self.llm.model_name}' has no chat template: leave --lm-eval-chat out")
        template = self.llm.chat_template.with_tokens(self.llm.tokenizer.special_tokens)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one), for each."""
        return self._score([self._encode(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, in windows of the full context."""
        rows: list[_Encoded] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = harness_utils.get_rolling_token_windows(
                token_list=self.llm.tokenizer.encode(request.args[0], add_special=False),
                prefix_token=self._prefix,
                max_seq_len=self.llm.config.max_context - 1,
                context_len=1,
            )
            rows += [harness_utils.make_disjoint_window(window) for window in windows]
            owners += [number] * (len(rows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(rows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A continuation for each, which ends before the first of its stops."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            wanted = sampling(options)
            token_ids = self._cut(self._tokens(context), self.llm.config.max_context - (wanted.max_tokens or 1))
            prompts.append(token_ids)
            params.append(wanted)
        return [completion.text for completion in self._complete(prompts, params)]

    @property
    def _prefix(self) -> int:
        """What an empty context is replaced by."""
        bos = self.llm.tokenizer.bos_id
        return self.llm.tokenizer.eos_ids[0] if bos is None else bos

    def _tokens(self, text: str) -> list[int]:
        """A chat template makes its control tokens itself."""
        encode = self.llm.tokenizer.encode
        return encode(text, add_special=not self._is_chat, parse_special=self._is_chat) or [self._prefix]

    def _encode(self, context: str, continuation: str) -> _Encoded:
        """Spaces at the end of the context belong to the continuation."""
        if not context:
            return [self._prefix], self.llm.tokenizer.encode(continuation, add_special=False)
        num_spaces = len(context) - len(context.rstrip())
        if num_spaces:
            context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
        given, whole = self._tokens(context), self._tokens(context + continuation)
        return whole[: len(given)], whole[len(given) :]

    def _score(self, rows: Sequence[_Encoded]) -> list[tuple[float, bool]]:
        limit = self.llm.config.max_context
        prompts = [self._cut([*given, *scored], limit) for given, scored in rows]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        found = []
        for (_, scored), completion in zip(rows, self._complete(prompts, [params] * len(rows)), strict=True):
            entries = completion.outputs[0].prompt_logprobs[-len(scored) :] if scored else ()
            known = [entry for entry in entries if entry is not None]
            found.append((math.fsum(entry.logprob for entry in known), all(entry.rank == 1 for entry in known)))
        return found

    def _cut(self, token_ids: list[int], limit: int) -> list[int]:
        """The end of what exceeds the context."""
        self.num_cut += len(token_ids) > limit
        return token_ids[-limit:]

    def _complete(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Raises the error of the first that fails: without it the task's score would mean nothing."""
        completions = self.llm.generate(prompts, params)
        for completion in completions:
            if completion.outputs[0].error is not None:
                raise completion.outputs[0].error
        return completions


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """The harness's generation options. ConfigError for those that turbolm doesn't have."""
    given = dict(options)
    stops = given.pop("until", None) or ()
    lengths = [given.pop(name) for name in _LENGTHS if name in given]
    is_sampled = given.pop("do_sample", None)
    known = {name: kind(given.pop(name)) for name, kind in _SAMPLING.items() if given.get(name) is not None}
    if given:
        name = next(iter(given))
        allowed = ("until", "do_sample", *_LENGTHS, *_SAMPLING)
        raise ConfigError(
            f"the task asks to generate with '{name}', which turbolm doesn't have.{nearest(name, allowed)} "
            f"It has: {', '.join(allowed)}"
        )
    if not is_sampled:
        known["temperature"] = known.get("temperature", 0.0) if is_sampled is None else 0.0
    stop = (stops,) if isinstance(stops, str) else tuple(text for text in stops if text)
    return SamplingParams(max_tokens=int(lengths[0]) if lengths else _MAX_TOKENS, stop=stop, **known)


def run(
    model: str, tasks: Sequence[str], engine: EngineConfig, *, folder: Path | None, limit: int, shots: int | None,
    is_chat: bool, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Runs tasks of the harness, prints their metrics, and returns them as a JSON value. `folder`: with task files of
    one's own; `limit`: items of each task, 0: all; `shots`: solved examples before each question. ConfigError for
    unknown tasks."""
    manager = _manager(tasks, folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ConfigError(
                f"lm-evaluation-harness has no task '{task}'.{nearest(task, manager.all_tasks)} Tasks of one's own are "
                "named with --lm-eval-folder"
            )
    with LLM(model, engine) as llm:
        adapter = HarnessModel(llm, is_chat=is_chat)
        # Not the harness's `simple_evaluate`, which lists every installed package at the end.
        found = evaluate(
            adapter,
            _load_tasks(manager, tasks, shots, seed),
            limit=limit or None,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
        )
    if adapter.num_cut:
        logger.warning("%d prompts exceed the context: their beginnings were left out", adapter.num_cut)
    scores = scores_of(found)
    _print(scores)
    return {
        "model": model,
        "lm_eval": {"version": version("lm_eval"), "limit": limit, "shots": shots, "chat": is_chat},
        "num_cut": adapter.num_cut,
        "scores": scores,
    }


def _manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """The harness's own tasks take it a while to read: only where they are asked for."""
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    return TaskManager(include_path=str(folder) if folder else None)


def _load_tasks(manager: TaskManager, tasks: Sequence[str], shots: int | None, seed: int) -> Any:
    """As the harness evaluates them. A task that wants no examples gets none."""
    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        task.set_fewshot_seed(seed=seed)
    return loaded


def scores_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of task, metric, value and its standard error."""
    rows = []
    for task, metrics in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": kind,
                    "num_items": count,
                    "value": float(value),
                    "error": float(error) if isinstance(error, (int, float)) else None,
                }
            )
    return rows


def _print(scores: Sequence[Mapping[str, Any]]) -> None:
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("task", "metric", "filter"):
        table.add_column(column)
    for column in ("items", "value", "standard error"):
        table.add_column(column, justify="right")
    for row in scores:
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        names = (row["task"], row["metric"], "" if row["filter"] == "none" else row["filter"])
        table.add_row(*names, str(row["num_items"] or ""), f"{row['value']:.4f}", error)
    console.print(table)
