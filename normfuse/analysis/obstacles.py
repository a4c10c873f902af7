"""What stands in the way of a rewrite, and what people are told of it: the one place of its words.

Analyses, walks and the placement on modules answer with an `Obstacle` where they must stop. Passes choose by its code and tell
its words, which follow the name of the node: "'head.weight' is read more than once".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from typing import Any

from torch.fx import Node

from normfuse.graph.program import Program


@unique
class Why(Enum):
    """What a node does that is in the way; the words have places for an obstacle's details."""

    # values and their readers
    READ_AGAIN = "is read more than once"
    READ_BY_NOBODY = "is read by nobody"
    READ_BY_NO_LAYER = "is read by no linear layer"
    READ_BEFORE = "reads the value before the norm as well"
    READS_IT = "reads it"
    READS_TWICE = "reads the value in two ways"
    READS_TOO = "reads '{}' too, which it needs otherwise"
    READS_IN_FULL = "reads '{}' in its full width"
    NO_LAYER = "is no linear layer"
    PART = "is a part of what is read in other ways"

    # operators
    NO_SCALE = "does not let a scale of its channels through"
    NO_SHIFT = "does not let a shift through"
    NO_BASIS = "does not let a change of basis through"
    NO_WIDTH = "has no rule for another width"
    JOINS_ANOTHER = "joins it with another value"
    JOINS_SCALES = "joins values of different scales"
    JOINS_UNKNOWN = "joins parts whose sizes are not known"
    ADDS_OTHERS = "adds what does not vary along the channels"
    DIFFERS = "differs along another axis than the channels"
    RESHAPED = "is reshaped so that its channels are no longer one axis"
    SCALED_WHOLE = "is scaled as a whole, not along an axis"
    ILL_CONDITIONED = "would be divided by scales that are zero, or more than {:g} apart"
    EXPANDED = "reads '{}', which is as wide and the same for every feature; let it broadcast instead"
    OTHER_DTYPE = "has another dtype than its input"

    # layers
    MIXES_OTHERS = "mixes another axis than the channels"
    MIXES_OTHER_MEANS = "mixes other channels than those of the mean"
    MIXES_GROUPS = "mixes the channels in groups, or another axis"
    WRITES_ELSEWHERE = "writes its channels along another axis"
    WRITES_GROUPS = "writes its channels in groups"
    PADS = "adds zeros around its input, which a shift would change"
    OTHER_BIAS = "has a bias of another shape than its channels"
    NO_BIAS_OF_ITS_OWN = "is no bias of its own"
    NO_WEIGHT_OF_ITS_OWN = "multiplies by what is not a weight of its own"
    NO_STORED_FACTOR = "multiplies by what is no stored weight"
    WEIGHT_NOT_STORED = "has a weight that is not stored"
    SCALES_BIAS = "scales its bias"
    SCALES_PRODUCT = "scales what it multiplies"
    HAS_MAP = "has a map added to what it gives"

    # attention
    NO_KEYS = "may have no keys at all"
    SUMS_TO_OTHERS = "multiplies by weights that need not sum to one"
    DROPS = "drops some of its weights"
    MASKED = "may keep a query from every key, which gives it zeros and not a mean of the values"
    SHARED_HEADS = "lets several heads share their values"

    # stored tensors
    NOT_STORED = "is no stored tensor that may change"
    NO_WRITER = "is no stored tensor, and none writes it alone"
    NO_STORED_WEIGHT = "is no stored weight"
    NO_STORED_AFFINE = "is no stored gain or shift"
    FIXED_WIDTH = "cannot change its width"
    QUANTIZED = "is quantized by {} and stays so: another value would leave its grid"
    CODEBOOK = "is a codebook that all channels pick from, so no channel can be changed by itself"
    NO_FLOAT = "is stored as {} and stays so: it cannot hold the weight's new value"

    # the mean of what a norm reads; of the first two, the detail is the reader that sees it
    SEEN = "sees the mean of what this norm reads"
    TIED = "sees the mean of a weight that writes what this norm reads"
    UPDATED = "is updated by the program itself"
    INPUT = "gives what this norm reads its mean"
    JOINED = "joins or splits what this norm reads along its axis"
    NORM = "writes what this norm reads, and its gain gives that a mean"
    GATE = "scales what this norm reads channel by channel"
    UNCENTRED = "writes what this norm reads and cannot be centred"
    HAS_MEAN = "does not write zero means"

    # what it would cost
    COSTS = "needs one of {} explicit changes of basis, which would serve {} of the norms"

    # a change at the node that has no place on modules, as a sentence
    NEW_TENSOR = "it computes with a new tensor that no module has a place for"
    OTHER_SIZE = "the tensor '{}' would get another size"
    UNREAD = "nobody reads '{}' afterwards, but the model's own class would"
    LEAVES = "'{}' would leave the state dict, and from_pretrained would make it up"
    OTHER_FORM = "'{}' is stored in another form than its class has it (joined, split or cast), so it cannot be changed there"
    STAYS = "its class would go on normalizing"
    LEFT_OUT = "'{}' would be a new tensor, which from_pretrained leaves out"
    LEAVES_SHARDS = "'{}' would leave its module, and fully_shard would put its shards back"
    LEFT_WHOLE = "'{}' would be a new tensor beside those that are in shards"
    CALLED_AGAIN = "its module is called several times, and the calls do not change alike"
    READS_TWO = "a new operation would read two values that no single module is given"
    IN_A_FORWARD = "a new operation would stand between two functions of one forward method"
    READS_SEVERAL = "what takes its place reads several values"
    HAS_SIZES = "what takes its place depends on the sizes of the traced inputs"
    NO_MODULE = "it is in no module of its own that could be replaced"


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way.

    Attributes:
        code: what it does there.
        at: the node in the way.
        detail: what the words leave open, or the node that they are about.
    """

    code: Why
    at: Node
    detail: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.code.value.format(*self.detail)

    @property
    def witness(self) -> Node | None:
        """The reader that sees a mean, where there is one."""
        return next((each for each in self.detail if isinstance(each, Node)), None)


def told(program: Program, obstacle: Obstacle) -> str:
    """What stands in the way, as a sentence for the user."""
    return "the caller reads its output" if obstacle.at.op == "output" else f"{named(program, obstacle.at)} {obstacle}"


def named(program: Program, node: Node) -> str:
    """What users call a node that is in the way: the caller, a stored tensor, a place in their code."""
    return "the caller" if node.op == "output" else f"'{program.stored.get(node.name) or program.site(node)}'"
