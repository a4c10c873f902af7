"""What a test suite gets from normfuse: the fixture ``normfuse_equivalent``.

    def test_the_export_is_the_model(normfuse_equivalent):
        normfuse_equivalent("model.pt2", "model.onnx")

pytest finds the plugin by itself where normfuse is installed; nothing heavy is imported until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from normfuse.proof.evidence import Evidence


@pytest.fixture
def normfuse_equivalent(record_property: Callable[[str, object], None]) -> Callable[..., Evidence]:
    """`normfuse.assert_equivalent`; the figures go into the JUnit report as properties of the test."""
    from normfuse.api.verification import assert_equivalent

    def check(a: Any, b: Any, inputs: Any = None, **options: Any) -> Evidence:
        evidence = assert_equivalent(a, b, inputs, **options)
        for name in ("error", "noise", "ratio"):
            record_property(f"normfuse_{name}", getattr(evidence, name))
        return evidence

    return check
