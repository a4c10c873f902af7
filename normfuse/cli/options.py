"""Options that several commands share, and what they mean."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import rich_click as click

from normfuse.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from normfuse.sources.inputs import Inputs
    from normfuse.sources.source import Source as Opened
Command: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Opening:
    """How a model is to be opened, as the options say."""

    architecture: str | None
    weights: str | None
    trust_pickle: bool
    trust_remote_code: bool

    def opened(self, model: str) -> Opened | str:
        """What the user names, opened; the path itself where only a runtime can open it."""
        from normfuse.api.verification import is_exported
        from normfuse.sources.opened import open as open_source

        if is_exported(model):
            return model
        return open_source(
            model, architecture=self.architecture, weights=self.weights, trust_pickle=self.trust_pickle,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """How a model is to be opened and what it is to be called with, as the options say."""

    specs: tuple[str, ...]
    file: str | None
    seed: int
    opening: Opening

    def opened(self, model: str) -> Opened | str:
        """What the user names, opened; the path itself where only a runtime can open it."""
        return self.opening.opened(model)

    @property
    def path(self) -> str | None:
        """The file of inputs itself, without the function that is named in it."""
        script = SCRIPT.fullmatch(self.file or "")
        return script["path"] if script else self.file

    def inputs(self, model: Opened | str) -> Inputs | None:
        """The inputs that the user gave; None leaves it to the model to know them."""
        from normfuse.sources.index_limits import has_integers, integer_limits
        from normfuse.sources.input_files import from_file, from_script
        from normfuse.sources.specs import from_specs

        if self.specs and self.file:
            raise InputError("--input and --inputs were both given", hint="give the inputs in one way")
        if self.file or not self.specs:
            if script := SCRIPT.fullmatch(self.file or ""):
                return from_script(script["path"], script["name"] or "inputs")
            return from_file(self.file) if self.file else None
        drawn = from_specs(self.specs, seed=self.seed)
        if isinstance(model, str) or not has_integers(drawn):
            return drawn
        limits = integer_limits(model.model, drawn)
        return from_specs(self.specs, seed=self.seed, index_limits=limits)


SPEC_HELP = (
    'An example input, such as "float32[batch,3,224,224]" or "ids:int64[batch=4,seq=16:1-512]"; a name in place of a size '
    "is a dynamic dim, 32*k a multiple. name=value is an input that is no tensor (use_cache=false), batch.ids:int64[2,16] an "
    "entry of a dict. Give it once for every input, or not at all where the model tells of its inputs."
)

FILE_HELP = (
    "Example inputs from a .pt, .npy, .npz or .safetensors file; or FILE.py:NAME of your own, which is run: NAME() gives one "
    "example after the other, as a DataLoader does."
)
MODEL_HELP = (
    "What model the weights in MODEL are of, where they come without one: timm:NAME, torchvision:NAME, transformers:FOLDER, or "
    "FILE.py:NAME of your own, which is run: NAME() gives the model."
)
SCRIPT = re.compile(r"(?P<path>.*\.py)(?::(?P<name>\w+))?")


def with_opening(command: Command) -> Command:
    """Add the options that make an `Opening`."""

    @click.option("--model", "architecture", metavar="ARCHITECTURE", help=MODEL_HELP)
    @click.option(
        "--weights", metavar="FILE", help="The weights of MODEL, where MODEL is an architecture or a folder without them."
    )
    @click.option("--trust-remote-code", is_flag=True, help="Run the code that a folder brings (auto_map) on this machine.")
    @click.option("--trust-pickle", is_flag=True, help="Let the file run whatever code it contains on this machine.")
    @functools.wraps(command)
    def with_opening(
        *, architecture: str | None, weights: str | None, trust_pickle: bool, trust_remote_code: bool, **rest: Any
    ) -> Any:
        return command(opening=Opening(architecture, weights, trust_pickle, trust_remote_code), **rest)

    return with_opening


def with_source(command: Command) -> Command:
    """Add the options that make a `Source`."""

    @click.option("--input", "specs", multiple=True, metavar="SPEC", help=SPEC_HELP)
    @click.option("--inputs", "file", metavar="FILE", help=FILE_HELP)
    @click.option("--seed", default=0, metavar="N", show_default=True, help="Seed of the inputs that --input draws.")
    @with_opening
    @functools.wraps(command)
    def with_source(*, specs: tuple[str, ...], file: str | None, seed: int, opening: Opening, **rest: Any) -> Any:
        return command(source=Source(specs, file, seed, opening), **rest)

    return with_source


def with_answer(command: Command) -> Command:
    """Add the options of every command."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks, as does NORMFUSE_DEBUG=1.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document, errors included.")(command)


def known_passes(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> str | list[str]:
    """Names of passes as click gives them; ``all`` stands for itself."""
    from normfuse.planning.registry import passes

    for name in names:
        if name != "all" and name not in passes():
            raise InputError(f"there is no pass '{name}'", hint=did_you_mean(name, [*passes(), "all"], "see normfuse passes"))
    return "all" if "all" in names else list(dict.fromkeys(names))


DATA = (
    "Inputs of the model from a .pt, .npy, .npz or .safetensors file, a row for every sample. A tensor 'targets' among them "
    "holds the class of every prediction (-100 for none); token ids without targets predict their own successors."
)


def with_data(command: Command) -> Command:
    """Add the options that tell of the data, and hand over its batches."""

    @click.option("--data", required=True, metavar="FILE", help=DATA)
    @click.option("--batch", default=8, show_default=True, metavar="N", type=click.IntRange(min=1), help="Rows of a batch.")
    @with_opening
    @functools.wraps(command)
    def with_data(*, data: str, batch: int, **rest: Any) -> Any:
        def batches() -> list[Inputs]:
            from normfuse.sources.input_files import from_file
            from normfuse.stripping.calibration import batches_of

            return batches_of(from_file(data), batch)

        return command(data=data, batches=batches, **rest)

    return with_data
