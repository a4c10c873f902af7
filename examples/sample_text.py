"""Continue a prompt with an exported byte-level model: `python examples/sample_text.py examples/tiny_gpt.pt2 "The "`.

Needs torch alone. Run it on a program before and after a rewrite: both write the same text.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 128  # bytes the exported program reads at most


@torch.no_grad()
def continued(model: Callable[[Tensor], Tensor], prompt: bytes, length: int) -> bytes:
    """Returns the prompt and `length` more bytes, each the most likely one after the bytes before it."""
    text = bytearray(prompt)
    for _ in range(length):
        logits = model(torch.tensor([list(text[-CONTEXT:])]))
        text.append(int(logits[0, -1].argmax()))
    return bytes(text)


def main() -> None:
    """Loads the program and prints the prompt with its continuation."""
    parser = argparse.ArgumentParser(description="Continue a prompt greedily with an exported byte-level model.")
    parser.add_argument("program", type=Path, help="a .pt2 file, as trained or rewritten")
    parser.add_argument("prompt", help="the text to continue, one byte or more")
    parser.add_argument("--length", type=int, default=100, help="bytes to write (default: %(default)s)")
    options = parser.parse_args()
    if not options.prompt:
        parser.error("the prompt is empty")

    torch.set_num_threads(1)  # one byte at a time is too little work to share
    model = torch.export.load(options.program).module()
    print(continued(model, options.prompt.encode(), options.length).decode(errors="replace"))


if __name__ == "__main__":
    main()
