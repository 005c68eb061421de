"""How similar a text is to references: ROUGE, BLEU and chrF by the packages that define them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL")
_PACKAGES = {"rouge": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu",) * 2, "chrf": ("sacrebleu",) * 2}


def missing_package(check: str) -> str | None:
    """The package that a check needs and that isn't installed."""
    module, package = _PACKAGES[check]
    return None if importlib.util.find_spec(module) else package


def rouge(text: str, references: Sequence[str], variant: str = "rougeL") -> float:
    """F-measure, the best over the references."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped,unused-ignore]

    scorer: Any = RougeScorer([variant])
    return max(float(scorer.score(reference, text)[variant].fmeasure) for reference in references)


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU with exponential smoothing, 0 to 1."""
    import sacrebleu

    return float(sacrebleu.sentence_bleu(text, list(references)).score) / 100


def chrf(text: str, references: Sequence[str]) -> float:
    """chrF2, 0 to 1."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(text, list(references)).score) / 100
