"""The public surface: exactly these names, importable lazily, each with a docstring."""

from __future__ import annotations

import subprocess
import sys

import normfuse

PUBLIC = {
    "Calibration", "Claim", "Evidence", "Inputs", "Inspection", "NormfuseError", "Plan", "Program", "Report", "Result",
    "Source", "VerificationFailed", "assert_equivalent", "bisect", "calibrate", "deploy", "export", "inspect", "load", "open",
    "plan", "recalibrate", "restore", "rewrite", "strip", "tune", "verify",
}  # fmt: skip


def test_names_are_exactly_these() -> None:
    assert set(normfuse.__all__) == PUBLIC
    assert set(dir(normfuse)) >= PUBLIC


def test_every_name_has_a_docstring() -> None:
    for name in PUBLIC:
        assert (getattr(normfuse, name).__doc__ or "").strip(), name


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import normfuse, sys; assert 'torch' not in sys.modules; normfuse.rewrite; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_exporters_import_runtimes() -> None:
    code = (
        "import sys, pkgutil, importlib, normfuse\n"
        "for m in pkgutil.walk_packages(normfuse.__path__, 'normfuse.'):\n"
        "    if not m.name.startswith(('normfuse.__main__', 'normfuse.exporters.')): importlib.import_module(m.name)\n"
        "heavy = {'onnx', 'onnxruntime', 'onnxscript', 'tensorrt', 'transformers', 'timm', 'torchvision'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
