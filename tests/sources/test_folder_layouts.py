"""Folders in every layout come back in it; code of a folder runs where it is trusted; a full disk leaves nothing."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from normfuse.errors import InputError
from tests.sources.test_brought_back import asked
from tests.sources.test_folders_wrong import INDEX, config, everything, gpt2, refused, rewritten, whole

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["gpt2"]


def as_bin(folder: Path, *, sharded: bool) -> None:
    """The tensors as older folders keep them: pickles of torch.save."""
    table = json.loads((folder / INDEX).read_text())
    held = whole(folder)
    for each in folder.glob("*.safetensors*"):
        each.unlink()
    if not sharded:
        torch.save(held, folder / "pytorch_model.bin")
        return
    table["weight_map"] = {
        key: name.replace("model-", "pytorch_model-").replace("safetensors", "bin") for key, name in table["weight_map"].items()
    }
    for name in set(table["weight_map"].values()):
        torch.save({key: held[key] for key, place in table["weight_map"].items() if place == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_pickles_comes_back_as_one(sharded: bool, gpt2: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(gpt2, folder)
    as_bin(folder, sharded=sharded)
    answer = asked("rewrite", folder, "--pass", "pre_rmsnorm", "--json")
    assert answer.exit_code == 0, answer.output
    out = tmp_path / "m.rewritten"
    assert {each.name for each in out.iterdir()} == {each.name for each in folder.iterdir()}
    listed = json.loads(answer.stdout)["tensors"]
    for path in folder.glob("*.bin"):
        before, after = torch.load(path, weights_only=True), torch.load(out / path.name, weights_only=True)
        assert list(before) == list(after)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == set(before) & set(listed["changed"])
    cls = transformers.GPT2LMHeadModel
    one, other = (cls.from_pretrained(each, use_safetensors=False).eval() for each in (folder, out))
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(other(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_layout_is_read_that_transformers_reads(gpt2: Path, tmp_path: Path) -> None:
    """Which are other weights than those in the other layouts."""
    folder = tmp_path / "m"
    shutil.copytree(gpt2, folder)
    held = whole(folder)
    table = (folder / INDEX).read_bytes()
    shards = {each.name: each.read_bytes() for each in folder.glob("model-*")}
    rewritten(lambda held: {key: 2 * each for key, each in held.items()})(folder)
    for name, content in {INDEX: table, **shards}.items():
        (folder / name).write_bytes(content)
    torch.save(held, folder / "pytorch_model.bin")
    (folder / "1_Pooling").mkdir()
    opened = normfuse.open(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(opened.model.transformer.wte.weight, theirs.transformer.wte.weight)  # type: ignore[union-attr, arg-type]
    assert opened.notes == (
        f"model.safetensors was read, and {INDEX} and pytorch_model.bin was not",
        "folders in m are neither read nor copied: 1_Pooling",
    )


def test_what_is_no_number_is_not_proven(gpt2: Path, tmp_path: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")
        return held

    shutil.copytree(gpt2, tmp_path / "m")
    rewritten(change)(tmp_path / "m")
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
    assert answer.exit_code == 2, answer.output
    assert "NaN" in answer.output
    assert {each.name for each in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize(("ending", "changes"), [("attn.c_attn.weight", False), ("attn.c_proj.weight", True)])
def test_each_tensor_keeps_its_own_dtype(ending: str, changes: bool, gpt2: Path, tmp_path: Path) -> None:
    """One that the class casts when it loads is not written over, which would round it a second time."""

    def change(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: each.bfloat16() if key.endswith(ending) else each for key, each in held.items()}

    shutil.copytree(gpt2, tmp_path / "m")
    rewritten(change)(tmp_path / "m")
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "--verify", "structure", "-o", tmp_path / "out")
    if changes:
        assert answer.exit_code == 0, answer.output
        assert "NF104" in answer.output
        assert "is stored in another form than its class has it" in answer.output
        assert not (tmp_path / "out").exists()
    else:
        assert answer.exit_code == 0, answer.output
        before, after = whole(tmp_path / "m"), whole(tmp_path / "out")
        assert {key: each.dtype for key, each in after.items()} == {key: each.dtype for key, each in before.items()}


# -- code of a folder's own --------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
import transformers
Path({canary!r}).touch()
class Mine(transformers.GPT2LMHeadModel):
    pass
"""


def test_code_of_a_folder_runs_only_where_it_is_trusted(gpt2: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    shutil.copytree(gpt2, tmp_path / "m")
    config(architectures=["Mine"], auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(tmp_path / "m")
    (tmp_path / "m" / "modeling_mine.py").write_text(CODE.format(canary=str(canary)))
    for command in (("rewrite", "--pass", "pre_rmsnorm"), ("inspect",)):
        refused(asked(command[0], tmp_path / "m", *command[1:]), "brings code of its own")
    assert not canary.exists()
    answer = asked("inspect", tmp_path / "m", "--trust-remote-code", "--json")
    assert answer.exit_code == 0, answer.output
    assert canary.exists()
    assert json.loads(answer.stdout)["counts"]["layer_norm"] == 5


def test_what_the_code_of_a_folder_wants_is_no_hint_to_install_it(gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "m")
    config(architectures=["Mine"], auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(tmp_path / "m")
    (tmp_path / "m" / "modeling_mine.py").write_text("import a_strange_package\n")
    answer = asked("inspect", tmp_path / "m", "--trust-remote-code")
    refused(answer, "needs 'a_strange_package', a package not installed here")
    assert "pip install" not in answer.output
    assert "may be a stranger's" in answer.output


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(gpt2: Path, tmp_path: Path) -> None:
    """At whichever file it gets full."""
    result = normfuse.rewrite(normfuse.open(gpt2), "pre_rmsnorm", verify="none")
    before, free = everything(gpt2), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted({each.stat().st_size for each in gpt2.iterdir()})
    for limit in (0, *(size - 1 for size in sizes)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        try:
            with pytest.raises(InputError, match=r"cannot write .*File too large"):
                result.write_back(tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
        assert not list(tmp_path.iterdir())
    assert everything(gpt2) == before
    result.write_back(tmp_path / "out")
    assert set(everything(tmp_path / "out")) == set(before)


@pytest.mark.parametrize("step", ["_write_index", "write"])
def test_a_full_disk_is_one_line(step: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.sources.tensor_files import Weights

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Weights, step, full)
    answer = asked("rewrite", gpt2, "--pass", "pre_rmsnorm", "--verify", "structure", "-o", tmp_path / "out")
    refused(answer, "No space left on device")
    assert "make room" in answer.output
    assert not list(tmp_path.iterdir())
