"""Sampling without a sort against its definition in plain torch."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.ops import sampling as reference
from turbolm.ops.triton import filters
from turbolm.ops.triton.launch import pdl_options
from turbolm.ops.triton.sampling import argmax, sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, where a GPU is silent

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
GREEDY = (0.0, 0, 1.0, 0.0)
PLAIN = (1.0, 0, 1.0, 0.0)


def columns(rows: list[tuple[float, int, float, float]], uniform: Tensor) -> tuple[Tensor, ...]:
    """Rows of (temperature, top_k, top_p, min_p) as the arguments of `sample`."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return (
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(top_k, dtype=torch.int64, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
        uniform.double().to(DEVICE),
    )


def logits_of(rows: int, vocabulary: int, spread: float, seed: int) -> Tensor:
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


def evenly(count: int) -> Tensor:
    """The middles of equal parts of [0, 1): a token of probability q is drawn q·count times, give or take one."""
    return (torch.arange(count) + 0.5) / count


def assert_drawn_as_defined(logits: Tensor, parameters: tuple[Tensor, ...]) -> None:
    tokens = sample(logits, *parameters)
    assert tokens.dtype == torch.int32
    # Tokens follow each other as the uniform number grows; rounding may move their borders a little.
    *others, uniform = parameters
    low, high = (reference.sample(logits, *others, (uniform + e).clamp(0, 1 - 2**-53)) for e in (-2e-6, 2e-6))
    assert bool(((low <= tokens) & (tokens <= high)).all()), (tokens, low, high)


ROWS = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.sampled_from([0, 1, 2, 40, 5000]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=3),
    vocabulary=st.sampled_from([1, 17, 1024, 2500]),
    spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_same_draws_as_the_reference(
    rows: list[tuple[float, int, float, float]], vocabulary: int, spread: float, seed: int
) -> None:
    uniform = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_drawn_as_defined(logits_of(len(rows), vocabulary, spread, seed), columns(rows, uniform))


def test_all_filters_in_one_batch_of_a_longer_vocabulary() -> None:
    """Short lists of candidates, whole rows (nearly flat; a tiny temperature), plain and greedy rows together; the
    logits' rows are a part of longer ones, which hold NaN further on."""
    rows = [
        (1.0, 50, 0.9, 0.0),
        PLAIN,
        (0.7, 0, 0.95, 0.0),
        GREEDY,
        (50.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.02),
        (1e-6, 3, 1.0, 0.0),
        (1.0, 9000, 0.99, 0.0),
    ]
    storage = logits_of(len(rows), 9400, 4.0, 3)
    storage[:, 9300:] = torch.nan
    assert_drawn_as_defined(storage[:, :9300], columns(rows, evenly(len(rows))))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (1, 1.0, 0.0, [1]),
        (2, 1.0, 0.0, [1, 4]),
        (4, 1.0, 0.0, [0, 1, 2, 3, 4]),  # equals are kept or dropped together
        (0, 1e-6, 0.0, [1]),
        (0, 0.75, 0.0, [1, 2, 4]),
        (0, 0.69, 0.0, [1, 4]),
        (0, 1.0, 0.45, [1, 2, 4]),
        (3, 0.5, 0.0, [1, 4]),  # 0.4 / 0.9 is less than half of what top_k left
    ],
)
def test_filters_keep_what_they_say(top_k: int, top_p: float, min_p: float, kept: list[int]) -> None:
    """The middle of each kept token's share of the whole draws it."""
    probs = torch.tensor([0.05, 0.4, 0.2, 0.05, 0.3])
    shares = probs[kept] / probs[kept].sum()
    middles = shares.cumsum(0) - shares / 2
    logits = probs.log().repeat(len(kept), 1).to(DEVICE)
    assert sample(logits, *columns([(1.0, top_k, top_p, min_p)] * len(kept), middles)).tolist() == kept


@pytest.mark.parametrize("filtered", [PLAIN, (1.0, 3, 1.0, 0.0), (1.0, 0, 0.8, 0.0)])
def test_ties(filtered: tuple[float, int, float, float]) -> None:
    """Equal logits, more than a list of candidates takes, and zeros of both signs."""
    logits = torch.zeros(3, 8300, device=DEVICE)
    logits[:, ::2] = -0.0
    tokens = sample(logits, *columns([filtered] * 3, torch.tensor([0.0, 0.5, 1 - 2**-30])))
    assert tokens.tolist() == [0, 4150, 8299]


def test_frequencies_follow_the_distribution() -> None:
    count = 48
    logits = logits_of(1, 1100, 1.0, 0)
    logits[0, 1020:1030] += 7.0  # on both sides of a border of groups
    probs = torch.softmax(logits.double(), -1)[0].cpu()
    rows = logits.expand(count, -1)
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), probs.cumsum(0)])
    tokens = sample(rows, *columns([PLAIN] * count, evenly(count)), has_filters=False).cpu()
    assert torch.equal(tokens, tokens.sort().values)
    drawn = torch.bincount(tokens, minlength=1100).cumsum(0)
    assert bool(((drawn - count * expected[1:]).abs() <= 0.5 + 1e-3).all())


def test_random_uniform_numbers_pass_a_chi_square_test() -> None:
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    count = 50
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = probs.log().expand(count, -1).contiguous().to(DEVICE)
    tokens = sample(logits, *columns([PLAIN] * count, uniform), has_filters=False)
    counts = torch.bincount(tokens.cpu(), minlength=4)
    statistic = ((counts - count * probs).square() / (count * probs)).sum()
    assert statistic < 16.27  # 3 degrees of freedom: one in a thousand is above


def test_row_does_not_depend_on_the_batch() -> None:
    rows = [(0.8, 50, 0.9, 0.0), PLAIN, (2.0, 0, 0.9, 0.01)]
    logits = logits_of(3, 1500, 2.0, 0)
    parameters = columns(rows, torch.tensor([0.3, 0.6, 0.9]))
    together = sample(logits, *parameters)
    alone = [sample(logits[i : i + 1], *(column[i : i + 1] for column in parameters)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("vocabulary", [1, 15, 1023, 1025, 5000])
def test_argmax(vocabulary: int) -> None:
    logits = logits_of(4, vocabulary, 1.0, vocabulary)
    logits[1, vocabulary // 2 :] = logits[1].max() + 1  # the first of equals
    logits[2, : vocabulary // 2] = -torch.inf
    expected = logits.argmax(-1)
    expected[1] = vocabulary // 2
    assert torch.equal(argmax(logits).long(), expected)


def test_launch_options_stay_as_they_are() -> None:
    """They are made once per device: what one kernel's launch adds, the next one's would refuse on a GPU."""
    before = dict(pdl_options(DEVICE))
    sample(logits_of(1, 100, 1.0, 0), *columns([(1.0, 5, 0.9, 0.0)], torch.tensor([0.5])))
    assert pdl_options(DEVICE) == before


def test_rows_without_a_distribution() -> None:
    logits = logits_of(4, 2000, 1.0, 0)
    logits[0, 1234] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.nan
    assert argmax(logits).tolist()[:3] == [-1, -1, -1]
    for row in (PLAIN, (1.0, 5, 0.9, 0.0)):
        tokens = sample(logits, *columns([row] * 4, torch.full((4,), 0.5))).tolist()
        assert tokens[:3] == [-1, -1, -1]
        assert 0 <= tokens[3] < 2000


def test_infinite_logits_win() -> None:
    logits = logits_of(2, 100, 1.0, 0)
    logits[:, 42] = torch.inf
    assert sample(logits, *columns([PLAIN, (1.0, 5, 0.9, 0.0)], torch.tensor([0.5, 0.5]))).tolist() == [42, 42]


@pytest.mark.parametrize("filtered", [(5.0, 0, 1.0, 0.0), (5.0, 0, 0.99, 0.0), (5.0, 20, 1.0, 0.0)])
def test_banned_tokens_are_never_drawn(filtered: tuple[float, int, float, float]) -> None:
    """Not even at the ends of the uniform number's range."""
    logits = torch.full((3, 1200), -torch.inf, device=DEVICE)
    logits[:, 1020:1030] = 0.0
    tokens = sample(logits, *columns([filtered] * 3, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)))
    assert tokens.tolist() == [1020, 1025, 1029]


LONG = 9_000  # more than a row's list takes


@pytest.mark.parametrize(
    ("row", "spread"),
    [
        ((1.0, 0, 0.9, 0.0), 0.5),
        ((20.0, 0, 0.4, 0.3), 1.0),
        ((1.0, 4000, 1.0, 0.0), 1.0),
        ((1.0, 4000, 0.5, 0.0), 1.0),
        ((1.0, 150, 0.5, 0.1), 1.0),
    ],
)
def test_long_flat_rows(row: tuple[float, int, float, float], spread: float) -> None:
    """Passes over the row bring the border's neighbours down to a list."""
    assert_drawn_as_defined(logits_of(1, LONG, spread, 5), columns([row], torch.tensor([0.7])))


@pytest.mark.parametrize("row", [(1.0, 0, 0.7, 0.0), (1.0, 3000, 1.0, 0.0), (1.0, 3000, 0.7, 0.0)])
def test_more_neighbours_of_the_border_than_a_list_takes(row: tuple[float, int, float, float]) -> None:
    logits = (logits_of(1, LONG, 1.0, 6) > 0).float() * 1e-6
    logits[:, ::1000] = 1.0
    assert_drawn_as_defined(logits, columns([row], torch.tensor([0.7])))


def test_brackets_enclose_the_border_and_little_else() -> None:
    rows = [
        (1.0, 50, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (9.0, 0, 0.9, 0.0),
        (1.0, 4000, 1.0, 0.0),
        (1.0, 40, 0.9, 0.0),
        (1.0, 0, 1.0, 0.05),
        PLAIN,
    ]
    logits = logits_of(1, LONG, 3.0, 1).expand(len(rows), -1).contiguous()
    temperature, top_k, top_p, min_p, _ = columns(rows, torch.zeros(len(rows)))
    groups = logits.new_full((len(rows), -(-LONG // 1024), 1024), -torch.inf)
    groups.view(len(rows), -1)[:, :LONG] = logits
    maxima = groups.amax(-1)
    minima = torch.where(groups == -torch.inf, torch.inf, groups).amin(-1)
    sums = ((groups - maxima.unsqueeze(-1)) / temperature.view(-1, 1, 1)).exp().sum(-1)
    peaks = groups.unflatten(-1, (filters.PEAKS.value, -1)).amax(-1)
    found = filters.bracket(logits, (temperature, top_k, top_p, min_p), maxima, minima, sums, peaks)
    keys = found.brackets[:, :2]
    low, high = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32).unsqueeze(-1).unbind(1)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature.unsqueeze(1)).exp()
    kept_by_p = [int((row.sort(descending=True).values.cumsum(0) < 0.9 * row.sum()).sum()) + 1 for row in weights]
    kept = [50, kept_by_p[1], kept_by_p[2], 4000, 40, int((weights[5] >= 0.05).sum())]
    for i, needed in enumerate(kept):
        enclosed = (logits[i] > low[i]) & (logits[i] <= high[i])
        assert int((logits[i] > high[i]).sum()) <= needed <= int((logits[i] > low[i]).sum())
        assert found.num_listed[i] == enclosed.sum() <= filters.CAPACITY.value // 2
        listed, order = found.ids[i, : found.num_listed[i]].long().sort()
        assert torch.equal(listed, enclosed.nonzero().squeeze(1))
        assert torch.equal(found.values[i, : len(listed)][order], logits[i, listed])
        surely = torch.where((logits[i] > high[i]) & (weights[i] >= min_p[i]), weights[i], 0.0)
        torch.testing.assert_close(found.kept[i].sum(), surely.sum(), rtol=1e-5, atol=1e-5)
    assert found.num_listed[5] == 0, "min-p alone needs no search"
    assert found.brackets[6, 2] == -1
