"""Whether a stored tensor's means are zero is asked piece by piece of a large one, with the same answer."""

from __future__ import annotations

import pytest
import torch

from normfuse.transforms import width


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "axis"), [((30, 8), 1), ((8, 30), 0), ((30, 8), -1), ((5, 6, 8), 2), ((8,), 0), ((1, 8), 1)])
def test_pieces_tell_what_the_whole_tells(
    sizes: tuple[int, ...], axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = value - value.mean(axis, keepdim=True)
    one = centred.clone()
    one.view(-1)[-1] += 1  # in the last piece alone
    nan = centred.clone()
    nan.view(-1)[0] = float("nan")
    cases = [each.to(dtype) for each in (value, centred, one, nan, torch.zeros(sizes))]
    whole = [width._is_nearly_centred(each, axis) for each in cases]
    assert whole == [False, True, False, False, True]
    for piece in (1, 8, 50):
        monkeypatch.setattr(width, "PIECE", piece)
        assert [width._is_nearly_centred(each, axis) for each in cases] == whole
