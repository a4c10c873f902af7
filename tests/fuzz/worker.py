"""A long-lived process that runs commands of normfuse and tells what they did: ``python -m tests.fuzz.worker FOLDER``.

Each line of standard input is a JSON list of words; each line of standard output the JSON of an `Answer`. What an audit hook
sees while a command runs is told: files opened for writing outside the folder, programs started, strangers imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes beyond what a warm worker has."""
STRANGER = "fuzz_stranger"
"""A module that nothing but a hostile file imports."""
STARTS = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
CHANGES = {"os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
           "os.utime", "shutil.copyfile", "shutil.move", "shutil.rmtree"}  # fmt: skip
SOCKETS = {"socket.connect", "socket.bind", "urllib.Request"}


@dataclass
class Answer:
    """What a command did.

    Attributes:
        code: its exit code; None where it did not leave by itself.
        said: what it wrote, both streams.
        raised: a traceback, where it raised.
        acts: what the hook saw of programs and strangers.
        files: what the hook saw of files outside the folder.
    """

    code: int | None = None
    said: str = ""
    raised: str = ""
    acts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Watch:
    """An audit hook; it cannot be removed, so it is switched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answer = folder.resolve(), None  # type: tuple[Path, Answer | None]
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        answer = self.answer
        if answer is None:
            return
        if event in STARTS or event in SOCKETS or (event == "import" and args[0] == STRANGER):
            answer.acts.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes)) and _writes(args[1], args[2]) and self._outside(args[0]):
            answer.files.append(f"open {args[0]!r:.200}")
        elif event in CHANGES and any(isinstance(each, (str, bytes)) and self._outside(each) for each in args):
            answer.files.append(f"{event} {args!r:.200}")

    def _outside(self, path: str | bytes) -> bool:
        full = os.path.abspath(os.fsdecode(path))
        return full != os.devnull and not Path(full).is_relative_to(self.folder)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(each in mode for each in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def ran(words: list[str], watch: Watch) -> Answer:
    """Run a command in this process."""
    from normfuse.cli import main

    answer, said = Answer(), io.StringIO()
    watch.answer = answer
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(words)
    except SystemExit as left:
        answer.code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        answer.raised = traceback.format_exc()[-2000:]
    finally:
        watch.answer = None
    answer.said = said.getvalue()[-4000:]
    return answer


def limited() -> None:
    """Take no more memory than `MEMORY` beyond what is taken now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(folder: Path) -> None:
    """Answer until standard input ends."""
    lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    sys.dont_write_bytecode = True
    os.chdir(folder)
    watch = Watch(folder)
    warm = json.loads(next(lines))
    for words in warm:
        ran(words, watch)
    limited()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in lines:
        print(json.dumps(asdict(ran(json.loads(line), watch))), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
