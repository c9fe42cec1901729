"""Drawing a picture with a trace: a page that grows step by step beside where the picture will be."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from cutdiff.checkpoint.model import Model
from cutdiff.files import json_of
from cutdiff.options import options_of
from cutdiff.output.images import read_record, to_pil
from cutdiff.pipeline import Result, decode, generate, with_options
from cutdiff.sampling.draws import Draws
from cutdiff.settings import VERSION, Settings
from cutdiff.specs import TABLES, name_of
from cutdiff.trace import folder
from cutdiff.trace import page as pages
from cutdiff.trace.measures import bands
from cutdiff.trace.preview import fitted, model_map
from cutdiff.trace.recorder import Moment, Recorder
from cutdiff.trace.words import Words, unread_because


class Unwritable(Exception):
    """A trace that cannot be written; the message says where and why."""


def trace(
    model: Model,
    prompt: str,
    settings: Settings | None = None,
    *,
    page: str | Path = "trace.html",
    every: int | None = None,
    decode: bool = False,
    data: bool = False,
    draws: Draws | None = None,
    **options: Any,
) -> Result:
    """The same as `cutdiff.generate` of one prompt, which writes a page of what happened at each step.

    Every `every`-th step is shown in full; None: every one, or as few as 200 MB hold. With `decode` the estimates are
    decoded by the VAE, too, which takes its time. With `data` the folder beside the page that ends in `.trace` holds
    the same as tensors. Until the run has ended, the page's name ends in `.unfinished.html`. Raises ValueError where
    the prompt is a list, `every` no whole number or `page` no name of a page, and Unwritable where the page cannot be
    written.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r:.100} must be one text: trace one picture after the other")
    if every is not None and (type(every) is not int or every < 1):
        raise ValueError(f"every={every!r} must be a whole number of steps, 1 or more")
    is_folder = page != "" and Path(page).is_dir()
    if is_folder or Path(page).suffix.lower() not in (".html", ".htm"):
        what = "is a folder" if is_folder else "is not the name of a page"
        raise ValueError(f"page={str(page)!r} {what}: give a file that ends in .html")
    settings = with_options(model, settings, options)
    with tracing(model, prompt, settings, Path(page), every=every, decode=decode, data=data) as tracing_:
        result = generate(model, prompt, settings, draws=draws, observer=tracing_.recorder)
        tracing_.finish(result, Path(page))
    return result


class Tracing:
    """The trace of a run under way."""

    def __init__(
        self, model: Model, prompt: str, settings: Settings, page: Path, *, every: int | None, decode: bool, data: bool
    ) -> None:
        self.model, self.prompt, self.settings, self.page = model, prompt, settings, page
        self.every, self.decode, self.data = every, decode, data
        self.file: BinaryIO | None = None
        self.path = page
        """The page as long as the run goes on."""
        words = Words(model, prompt, settings)
        self.words = words.names
        self.recorder = Recorder(model, self._add, words=words, every=every, on_begin=self._begin)

    def finish(self, result: Result, page: Path) -> None:
        """Write the end of the run, and give the page its name."""
        latents = result.latents[:1].float().cpu()
        record = {name: result.record[name] for name in ("seconds", "network_evaluations", "peak_memory_bytes")}
        told = {"kind": "end", "state": "finished", "message": "", "record": record, "bands": bands(latents[0])}
        of = _of(result.record, self.every, self.decode)
        map_ = fitted(latents, result.images[:1])
        picture = pages.picture(to_pil(result.images[0]))
        with _writing(self.path):
            self._write(told | {"latents": pages.half(latents[0]), "map": map_, "picture": picture})
            self._write(of)
            if self.data:
                folder.end(self._folder(self.path), told | {"fingerprint": of["fingerprint"]})
            self._close()
            if self.data:
                _replace_folder(self._folder(self.path), self._folder(page))
            os.replace(self.path, page)

    def fail(self, message: str) -> None:
        """Write that the run ended before its last step, and leave the page under the name that it has."""
        if self.file is None:
            return
        told = {"kind": "end", "state": "failed", "message": message}
        with _writing(self.path):
            self._write(told)
            if self.data:
                folder.end(self._folder(self.path), told)
            self._close()

    def _begin(self, num_steps: int) -> None:
        model, settings = self.model, self.settings
        height, width = settings.canvas_size(model.native_size, model.factor)
        told: pages.Block = {
            "kind": "run",
            "format": pages.FORMAT,
            "version": VERSION,
            "prompt": self.prompt,
            "model": Path(model.source).name,
            "chosen": {kind: _chosen(kind, getattr(settings, kind)) for kind in TABLES},
            "settings": settings.described(),
            "size": [height, width],
            "native_size": model.native_size,
            "factor": model.factor,
            "num_steps": num_steps,
            "words": self.words,
            "words_unread": unread_because(self.model, self.prompt, settings),
        }
        told["map"], head = model_map(model), pages.head(self.prompt)
        with _writing(self.page):
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.path, self.file = _unfinished(self.page)
            pages.write(self.file, head)
            self._write(told)
            if self.data:
                shutil.rmtree(self._folder(self.path), ignore_errors=True)  # left of a run that failed
                folder.begin(self._folder(self.path), told)

    def _add(self, moment: Moment) -> int:
        told = pages.of_moment(moment)
        if self.decode and moment.denoised is not None and bool(moment.denoised.isfinite().all()):
            told["decoded"] = pages.picture(to_pil(decode(self.model, moment.denoised[None].to(self.model.device))[0]))
        with _writing(self.path):
            size = self._write(told)
            return max(size, folder.add(self._folder(self.path), moment)) if self.data else size

    def _write(self, told: pages.Block) -> int:
        assert self.file is not None
        return pages.write(self.file, pages.block(told))

    def _close(self) -> None:
        assert self.file is not None
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None

    @staticmethod
    def _folder(page: Path) -> Path:
        return page.with_suffix(folder.SUFFIX)


def is_page_of(picture: Path, *, every: int | None, decode: bool, data: bool) -> bool:
    """True where the page beside a PNG with a record is that of its trace, to the end, made by these options, and where
    the folder beside it is, too, if `data` are asked for. Decoded estimates that are not asked for do no harm."""
    page, record = picture.with_suffix(".html"), read_record(picture)
    if not page.is_file() or (data and not _is_folder_of(page.with_suffix(folder.SUFFIX), record)):
        return False
    with page.open("rb") as file:
        file.seek(max(0, page.stat().st_size - 1000))
        ends = tuple(pages.block(_of(record, every, decoded)) for decoded in {decode, True})
        return file.read().endswith(ends)


def _of(record: dict[str, Any], every: int | None, decode: bool) -> pages.Block:
    """The last block of a page, which tells of which picture it is and by which options."""
    return {"kind": "of", "fingerprint": record.get("fingerprint"), "every": every, "decode": decode}


def _is_folder_of(path: Path, record: dict[str, Any]) -> bool:
    """True where a folder holds the data of the trace of a record's picture, to the end."""
    try:
        told = json_of(path / folder.END)
    except (OSError, ValueError):
        return False
    return told.get("fingerprint") == record.get("fingerprint")


@contextmanager
def tracing(model: Model, prompt: str, settings: Settings, page: Path, **how: Any) -> Iterator[Tracing]:
    """The trace of the run inside the block, which `finish` ends; whatever ends it else is told on the page."""
    own = Tracing(model, prompt, settings, page, **how)
    try:
        with own.recorder.listening():
            yield own
    except Unwritable:
        raise
    except BaseException as error:
        own.fail(str(error) or type(error).__name__)
        raise


def _chosen(kind: str, thing: Any) -> str:
    """The name of a method or the like, and those of its options that are not as they are by themselves."""
    changed = [
        f"{o.name}={getattr(thing, o.name)}" for o in options_of(thing).values() if getattr(thing, o.name) != o.default
    ]
    return ", ".join([name_of(kind, thing), *changed])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise Unwritable(
            f"the trace {where} cannot be written ({error.strerror}): free space, or leave it out"
        ) from None


def _unfinished(page: Path) -> tuple[Path, BinaryIO]:
    """A page beside `page` for the time of a run, locked, in the place of one that a killed run has left."""
    for number in count():
        path = page.with_suffix(f".unfinished{f'-{number}' if number else ''}.html")
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return path, file
        file.close()  # another run has just given it its name
    raise AssertionError("numbers have no end")


def _replace_folder(source: Path, target: Path) -> None:
    """Give a folder its name, in the place of that of an earlier trace."""
    if (target / folder.RUN).exists():
        shutil.rmtree(target)
    source.rename(target)
