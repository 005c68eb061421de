from __future__ import annotations

import numpy as np
import pytest

from turbolm.embedding import Embedding
from turbolm.errors import EngineError, RequestError

POOLED = np.array([3.0, 4.0, 12.0], "<f4").tobytes()


def test_shapes() -> None:
    assert Embedding.of(POOLED, 5, None, normalize=False).vector.tolist() == [3.0, 4.0, 12.0]
    unit = Embedding.of(POOLED, 5, 2, normalize=True)
    assert np.allclose(unit.vector, [0.6, 0.8]) and unit.vector.dtype == np.float32 and unit.num_tokens == 5


def test_nothing_has_no_direction() -> None:
    assert Embedding.of(bytes(8), 1, None, normalize=True).vector.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dimensions", [0, 4, -1, True, 1.0])
def test_dimensions_that_are_not_there(dimensions: object) -> None:
    with pytest.raises(RequestError, match="from 1 to 3") as caught:
        Embedding.of(POOLED, 5, dimensions, normalize=True)  # type: ignore[arg-type]
    assert caught.value.parameter == "dimensions"


def test_broken_numbers_are_no_embedding() -> None:
    with pytest.raises(EngineError, match="not finite"):
        Embedding.of(np.array([np.nan], "<f4").tobytes(), 1, None, normalize=True)
