"""The callback in transformers' own Trainer; skipped where accelerate, which the Trainer needs, is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normfuse.errors import NormfuseError
from normfuse.stripping import Diverged, Recovery, Schedule, trainer_callback
from tests.zoo import torchvision_shim
from tests.zoo.spread import spread

torchvision_shim.install()
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCHEDULE = Schedule(2, 2, (1, 1, 2))  # the last removal is at step 10
STEPS, CONTEXT, VOCABULARY = 14, 8, 31


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2,
        use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return spread(transformers.GPT2LMHeadModel(config))


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (256, CONTEXT), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer(folder: Path, steps: int = STEPS, **options: Any) -> tuple[Any, Recovery]:
    model = gpt2()
    recovery = Recovery(model, SCHEDULE, kwargs={"input_ids": rows()[0]["input_ids"][None]}, steps=STEPS)
    given = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "report_to": [], "save_steps": 5,
        "save_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**given, **options})
    made = transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=[trainer_callback(recovery)])
    return made, recovery


def test_the_schedule_is_followed_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole, recovery = trainer(tmp_path / "whole")
    whole.train()
    assert recovery.is_complete
    second, again = trainer(tmp_path / "whole")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert again.is_complete
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_the_auxiliary_loss_is_added_once_however_batches_are_accumulated(tmp_path: Path) -> None:
    def weights(**options: Any) -> dict[str, torch.Tensor]:
        made, recovery = trainer(tmp_path / str(len(options)), save_strategy="no", optim="sgd", **options)
        recovery.auxiliary = 50.0
        recovery.events = ()  # σ is measured per forward call, so removals differ
        recovery.require = lambda steps: None  # type: ignore[method-assign]
        made.train()
        return {name: value for name, value in made.model.state_dict().items() if name.endswith(("weight", "bias"))}

    one = weights()
    several = weights(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=1e-2, atol=1e-4)


def test_a_run_that_is_too_short_is_refused_before_training(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, steps=8)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(NormfuseError, match="8 steps are too few"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_a_run_that_diverges_is_stopped(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, learning_rate=1e12, max_grad_norm=0.0)
    with pytest.raises(Diverged, match="the loss is"):
        made.train()


def test_another_model_is_refused(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path)
    made.model = made.model_wrapped = gpt2()
    with pytest.raises(NormfuseError, match="another model"):
        made.train()
