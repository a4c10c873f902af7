"""Tensors that lie in a mapped file: what is dropped of them never was anybody's, and nothing is written into the file."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.sources import mapped
from normfuse.sources.mapped import LARGE, is_mapped, is_unwritten, let_go, letting_go, map_file, tensor_at, undoing

PAGE = mmap.PAGESIZE
COUNT = LARGE // 4 + 3 * PAGE // 4 + 5
"""Entries of float32: large, and no multiple of a page."""
kernel = pytest.mark.skipif(not mapped._kernel_tells(), reason="this system does not tell of pages")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 3 × COUNT numbers, 12 bytes in."""
    made = tmp_path / "numbers"
    made.write_bytes(bytes(12) + torch.arange(3 * COUNT, dtype=torch.float32).numpy().tobytes())
    return made


def third(path: Path, place: int = 0) -> Tensor:
    """One of three tensors in a row, which share pages."""
    return tensor_at(map_file(path), 12 + 4 * COUNT * place, torch.float32, (COUNT,))


def numbers(place: int = 0) -> Tensor:
    """What is stored there."""
    return torch.arange(place * COUNT, (place + 1) * COUNT, dtype=torch.float32)


def resident(tensor: Tensor) -> int:
    """Bytes of its pages that its process holds."""
    place = mapped._place(tensor)
    assert place is not None
    first, last = (place.address + place.start) // PAGE, -(-(place.address + place.end) // PAGE)
    with open("/proc/self/pagemap", "rb") as told:
        told.seek(8 * first)
        return PAGE * sum(entry >> 63 for entry in memoryview(told.read(8 * (last - first))).cast("Q"))


@kernel
def test_what_was_read_is_let_go_of_and_comes_back(path: Path) -> None:
    tensor = third(path, 1)
    assert is_mapped(tensor)
    assert is_unwritten(tensor)
    assert torch.equal(tensor, numbers(1))
    assert is_unwritten(tensor)
    assert resident(tensor) >= tensor.nbytes
    let_go(tensor)
    assert resident(tensor) <= 2 * PAGE  # those that it shares
    assert torch.equal(tensor, numbers(1))


def test_memory_of_no_file_is_untouched(path: Path) -> None:
    held = third(path)
    for tensor in (torch.randn(COUNT), held.clone(), copy.deepcopy(held), nn.Parameter(held.clone()), held + 1, held[:0]):
        before = tensor.detach().clone()
        assert not is_mapped(tensor)
        assert not is_unwritten(tensor)
        assert undoing(tensor) is None
        let_go(tensor)
        assert torch.equal(tensor, before)


def test_tensors_that_are_none_of_ours_are_untouched(path: Path) -> None:
    held = third(path)
    meta, sparse, own = held.to("meta"), torch.eye(3).to_sparse(), held.clone().as_subclass(_Own)
    nested = torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged)
    for tensor in (meta, sparse, own, torch.empty(0), held.as_subclass(_Own), nested):
        assert not is_mapped(tensor)
        assert not is_unwritten(tensor)
        assert undoing(tensor) is None
        let_go(tensor)


class _Own(Tensor):
    pass


WRITES: dict[str, Callable[[Tensor], object]] = {
    "first": lambda tensor: tensor[:1].fill_(-1),
    "last": lambda tensor: tensor[-1:].fill_(-1),
    "middle": lambda tensor: tensor[COUNT // 2].fill_(-1),
    "all": lambda tensor: tensor.mul_(2),
    "numpy": lambda tensor: tensor.numpy().__setitem__(COUNT // 3, -1),
    "data": lambda tensor: tensor.data[COUNT // 3].fill_(-1),
    "same": lambda tensor: tensor[COUNT // 3].fill_(float(tensor[COUNT // 3])),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_was_written_stays_and_never_reaches_the_file(path: Path, write: Callable[[Tensor], object]) -> None:
    before, tensor = path.read_bytes(), third(path, 1)
    write(tensor)
    expected = tensor.clone()
    assert is_mapped(tensor)
    assert not is_unwritten(tensor)
    for each in (tensor, tensor[1:], tensor.view(-1, 1), tensor.detach(), nn.Parameter(tensor)):
        let_go(each)
        assert torch.equal(tensor, expected)
    del tensor, each
    gc.collect()
    assert path.read_bytes() == before
    assert torch.equal(third(path, 1), numbers(1))


@kernel
def test_a_neighbour_that_was_written_stays(path: Path) -> None:
    file = map_file(path)
    left, right = (tensor_at(file, 12 + 4 * COUNT * place, torch.float32, (COUNT,)) for place in (0, 1))
    left[-3:], right[-1] = -1, -2
    torch.equal(left, numbers())
    for each in (left[: COUNT // 2], right[: COUNT // 2], left, right):
        let_go(each)
    assert left[-3:].tolist() == [-1, -1, -1]
    assert float(right[-1]) == -2
    assert torch.equal(left[:-3], numbers()[:-3])
    assert torch.equal(right[:-1], numbers(1)[:-1])


@kernel
def test_views_are_of_the_file_too(path: Path) -> None:
    tensor = third(path)[: COUNT // 2 * 2].view(2, -1)
    for view in (tensor, tensor.t(), tensor[1], tensor[:, ::2], tensor.detach(), nn.Parameter(tensor), tensor.expand(2, 2, -1)):
        assert is_mapped(view)
        assert is_unwritten(view)
        let_go(view)
    tensor[0, 0] = -1
    assert not is_unwritten(tensor)
    assert not is_unwritten(tensor.t())
    assert not is_unwritten(nn.Parameter(tensor))
    assert is_unwritten(tensor[1])


@kernel
def test_a_tensor_keeps_its_file_and_only_that(path: Path) -> None:
    tensor, maps = third(path), len(mapped._LIVE)
    other = third(path)
    del other
    gc.collect()
    assert len(mapped._LIVE) == maps
    assert torch.equal(tensor, numbers())
    path.unlink()  # as where a folder is replaced while somebody holds its tensors
    let_go(tensor)
    assert torch.equal(tensor, numbers())
    del tensor
    gc.collect()
    assert len(mapped._LIVE) == maps - 1


def test_memory_that_a_file_has_left_is_nobodys(path: Path) -> None:
    for _ in range(20):
        tensor = third(path)
        address = tensor.data_ptr()
        del tensor
        gc.collect()
        fresh = torch.full((COUNT,), 7.0)
        assert not is_mapped(fresh), address
        let_go(fresh)
        assert bool((fresh == 7).all())


def test_a_copy_and_a_saved_one_hold_only_their_own_bytes(path: Path) -> None:
    tensor = third(path, 1)
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tensor.storage_offset() == 0
    stream = io.BytesIO()
    torch.save(tensor[:10].clone(), stream)
    torch.save(tensor, stream)
    assert stream.tell() < tensor.nbytes + 8192
    again = copy.deepcopy(nn.Parameter(tensor))
    assert torch.equal(again, tensor)
    assert not is_mapped(again)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 12])
def test_a_place_of_any_alignment(path: Path, offset: int) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.complex64):
        tensor = tensor_at(map_file(path), offset, dtype, (3, 5))
        bytes_ = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert bytes_ == path.read_bytes()[offset : offset + tensor.nbytes]
        assert is_mapped(tensor) == (offset % dtype.itemsize == 0)


def test_a_tensor_of_nothing_and_one_beyond_the_file(path: Path) -> None:
    file = map_file(path)
    assert tensor_at(file, 0, torch.float16, (0, 3)).shape == (0, 3)
    assert tensor_at(file, 12, torch.float32, ()).item() == 0
    for offset, count in ((-4, 1), (len(file) - 4, 2), (len(file), 1), (0, len(file))):
        with pytest.raises(ValueError, match="beyond"):
            tensor_at(file, offset, torch.float32, (count,))


@kernel
def test_what_was_written_meanwhile_is_undone_and_the_neighbours_are_not(path: Path) -> None:
    file = map_file(path)
    left, ours, right = (tensor_at(file, 12 + 4 * COUNT * place, torch.float32, (COUNT,)) for place in range(3))
    left[-1], right[0] = -1, -2
    undo = undoing(ours)
    assert undo is not None
    ours.mul_(3)
    left[-2], right[1] = -3, -4
    undo()
    assert torch.equal(ours, numbers(1))
    assert left[-2:].tolist() == [-3, -1]
    assert right[:2].tolist() == [-2, -4]
    undo()
    ours[COUNT // 2] = -1
    assert undoing(ours) is None  # it is no longer what the file says


class _Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(weight), nn.Linear(2, 2)
        self.inner.weight = nn.Parameter(weight[:4].view(2, 2).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


@kernel
def test_modules_let_go_after_their_calls(path: Path) -> None:
    layer = nn.Sequential(_Layer(third(path)), _Layer(third(path, 1)))
    own = list(layer.parameters())[::3]
    usual = layer(torch.ones(2))
    assert all(resident(each) >= each.nbytes for each in own)
    with letting_go():
        assert torch.equal(layer(torch.ones(2)), usual)
    assert all(resident(each) <= 2 * PAGE for each in own)
    layer(torch.ones(2))
    assert all(resident(each) >= each.nbytes for each in own)  # outside, a model is its owner's


def test_where_the_kernel_does_not_tell_nothing_is_dropped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_kernel_tells", lambda: False)
    tensor = third(path)
    assert is_mapped(tensor)
    assert not is_unwritten(tensor)
    assert undoing(tensor) is None
    tensor[5] = -1
    let_go(tensor)
    assert float(tensor[5]) == -1


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 1 << 36
    with path.open("wb") as file:
        file.truncate(size)
    tensor = tensor_at(map_file(path), 0, torch.float32, (size // 4,))
    tensor[-1] = 3
    assert float(tensor[-1]) == 3
    assert float(tensor[0]) == 0


_MANY = """
import resource, sys
from pathlib import Path
from normfuse.sources.mapped import map_file
resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[2])))
held = []
try:
    for _ in range(100):
        held.append(map_file(Path(sys.argv[1])))
except OSError as error:
    print(error.strerror)
print(len(held))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_more_files_than_a_process_may_open_at_first(path: Path) -> None:
    def told(most: int) -> list[str]:
        command = [sys.executable, "-c", _MANY, str(path), str(most)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()

    assert told(200) == ["100"]
    if sys.version_info < (3, 13):  # newer ones hold no file open for a map
        assert told(40)[0] == "Too many open files"
