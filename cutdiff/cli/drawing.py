"""The pictures of a run are drawn, saved and reported, one after the other."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cutdiff.cli.arguments import BadArgument, of_flag
from cutdiff.cli.ending import Failure
from cutdiff.cli.runs import BadLine, Picture, is_set
from cutdiff.parallel import stopping
from cutdiff.parallel.lines import say, shown, write_line
from cutdiff.parallel.process import Ended

if TYPE_CHECKING:
    from cutdiff.checkpoint.model import Model
    from cutdiff.parallel.launch import Launch
    from cutdiff.pipeline import Result
    from cutdiff.sampling.denoiser import Observer
    from cutdiff.sampling.stages import Step


class Trace(Protocol):
    """A trace that follows a picture while it is drawn."""

    @property
    def recorder(self) -> Observer:
        """The observer of the run."""
        ...

    def finish(self, result: Result, page: Path) -> None:
        """The picture is saved, and the page of its trace gets this name."""
        ...


Follow = Callable[[Picture], AbstractContextManager["Trace | None"]]


def draw_all(
    model: Model, args: argparse.Namespace, pictures: list[Picture], launch: Launch, follow: Follow
) -> tuple[list[int], list[Path]]:
    """Draw the pictures that are not finished and print the path of each, in order if one group draws all; returns the
    lines that could not be drawn and the pictures of a set that have one value throughout, in the first process those
    of all groups. `follow` gives the trace of a picture, for the time in which it is drawn, or None."""
    from cutdiff.output.images import read_record

    with launch.agreeing():
        options = [(picture.settings.described(), picture.settings.sources()) for picture in pictures]
        others = launch.others([(picture.prompt, picture.path.name) for picture in pictures] + options)
        if others:
            raise Failure(f"rank {others[0]} was told of other prompts or options: tell all the same")
    finished = launch.any([picture.finished for picture in pictures])
    pictures = [replace(picture, finished=value) for picture, value in zip(pictures, finished, strict=True)]
    num_missing = len(pictures) - sum(finished)
    if num_missing < len(pictures) and launch.world.leads:
        tell(f"{len(pictures) - num_missing} of {len(pictures)} pictures are finished already")
    past_notices: set[str] = set()
    bad_lines: set[int] = set()
    with Progress(num_missing, launch) as progress:
        for picture in (pictures[turn] for turn in launch.turns(len(pictures))):
            try:
                path, record = picture.path, {}
                if not picture.finished:
                    with follow(picture) as trace:
                        path, record = _draw(model, args, picture, launch, progress, trace)
            except BadArgument as error:
                if not picture.line:
                    raise
                bad_lines.add(picture.line)
                if launch.group.leads:
                    leave_out(args, BadLine(args, picture.line, error))
                    launch.failed(picture.line)
                    progress.end()
                continue
            if not launch.group.leads:
                continue
            for notice in _notices(model, record):
                if notice not in past_notices:
                    tell(notice)
                past_notices.add(notice)
            print_line(_entry(picture, path, record) if args.log_json else str(path))
        if launch.world.leads:
            progress.wait()
            bad_lines |= launch.failures()
    paths = [picture.path for picture in pictures if is_set(args) and picture.line not in bad_lines]
    return sorted(bad_lines), [path for path in paths if launch.world.leads and read_record(path).get("one_value")]


def leave_out(args: argparse.Namespace, error: BadLine) -> None:
    """Tell of a line of the file of prompts, or of a given picture, that cannot be drawn."""
    tell(f"{error}; the other {'pictures' if args.images else 'lines'} are drawn")
    if args.log_json:
        print_line(json.dumps({"line": error.line, "state": "left out", "error": shown(str(error))}))


def _draw(
    model: Model, args: argparse.Namespace, picture: Picture, launch: Launch, progress: Progress, trace: Trace | None
) -> tuple[Path, dict[str, Any]]:
    """Draw one picture; returns the path at which the leading rank saved it, and its record."""
    import torch

    import cutdiff
    from cutdiff.output.images import NameTaken, save_image

    progress.begin(picture)
    try:
        result = cutdiff.generate(
            model,
            picture.prompt,
            picture.settings,
            ranks=launch.group,
            observer=None if trace is None else trace.recorder,
            on_step=progress.step,
        )
    except torch.OutOfMemoryError:
        raise Failure(
            "memory does not suffice for the network on one item: try --dtype bfloat16, or --device cpu"
        ) from None
    except (FloatingPointError, ValueError) as error:
        if not launch.group.leads and not picture.line:  # all ranks have met the error
            raise Ended from None
        if isinstance(error, ValueError):
            raise of_flag(error) from error
        raise
    record = result.record
    if not launch.group.leads:
        return picture.path, record
    if args.verbose:
        tell(_cost(record))
    names = {"overwrite": args.overwrite, "numbers": not is_set(args)}
    try:
        path = save_image(result.images[0], record, args.out, picture.path.stem, **names)
    except NameTaken as error:
        raise Failure(f"{error} is another picture, drawn by another run meanwhile: choose another --out") from None
    except OSError as error:
        raise Failure(f"{picture.path} cannot be written ({error.strerror}): free space, or change --out") from None
    if trace is not None:
        trace.finish(result, path.with_suffix(".html"))
    progress.end()
    return path, record


def _cost(record: dict[str, Any]) -> str:
    """The line of --verbose on what a picture took."""
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in record["seconds"].items())
    cost = f"{record['network_evaluations']} network evaluations; {seconds}"
    if record["ranks"] > 1:
        cost += f"; {record['ranks']} ranks, {record['received_bytes_per_step'] / 1e3:.1f} kB a step into the first"
    return cost


def _notices(model: Model, record: dict[str, Any]) -> Iterator[str]:
    """Notices about a picture, each of which a run prints only once."""
    if record and record["decoded_in"] != record["vae_dtype"]:
        yield f"the VAE overflowed in {record['vae_dtype']}, so it decoded in float32"
    if record and record["one_value"]:
        yield "a picture has one value throughout: its weights may be zeros, which --check-weights would find"
    if "prompt_unread" in record:
        yield "the regions cover all of the picture, so PROMPT was not read"
    yield from record.get("prompt_cut", ())
    if "positions_unread" in record:
        native = model.native_size * model.factor
        yield f"--positions changed nothing: the network was shown no more than its native {native} px at once"
    if "negative_prompt_unread" in record and model.unet.config.guidance_dim:
        yield "this model reads the guidance scale and no negative prompt, so that was not read: leave it out"
    elif "negative_prompt_unread" in record:
        yield "guidance is off, so the negative prompt was not read: --guidance-scale above 1 turns it on"
    for first, last in record.get("control_unread", ()):
        yield (
            f"the ControlNet of --control-interval {first:g} {last:g} was not read: this method evaluates the network "
            "in none of those steps"
        )
    if record and record["view_batch_halved"]:
        items = record["view_batch_size"]
        yield f"memory holds {items} patches or views at once: pass --view-batch-size {items}"


def _entry(picture: Picture, path: Path, record: dict[str, Any]) -> str:
    """The line that --log-json prints for a picture."""
    entry = {"line": picture.line or None, "seed": picture.settings.seed, "path": str(path)}
    if picture.finished:
        return json.dumps({**entry, "state": "finished"})
    seconds = round(sum(record["seconds"].values()), 3)
    evaluations = record["network_evaluations"]
    return json.dumps({**entry, "state": "drawn", "seconds": seconds, "network_evaluations": evaluations})


class Progress:
    """The progress of the run: a bar, if standard error is a terminal, and reports to the other ranks."""

    def __init__(self, num_pictures: int, launch: Launch) -> None:
        from tqdm import tqdm

        self.launch = launch
        self.began = time.perf_counter()
        self.name = ""
        self.drawn = 0  # the pictures that this group has drawn
        self.current = 0.0  # the finished share of the present picture
        self.bar = tqdm(
            total=num_pictures,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            smoothing=0,  # the time left is estimated from the mean of the whole run
            miniters=0,
            leave=False,
            disable=None if num_pictures and launch.world.leads else True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, picture: Picture) -> None:
        """Note that a picture is begun."""
        self.name, self.current = picture.path.name, 0.0
        self.launch.at(f"before the first step of {self.name}")

    def step(self, step: Step, num_steps: int) -> None:
        """Count a step of a picture that takes `num_steps`."""
        stopping.check()
        taken = round(self.current * num_steps) + 1
        self.current = taken / num_steps
        self.launch.at(f"after step {taken} of {num_steps} ({step.stage}) of {self.name}")
        self._show(step.stage)

    def end(self) -> None:
        """Note that the picture is saved."""
        self.drawn, self.current = self.drawn + 1, 0.0
        self.launch.drawn(1)

    def wait(self) -> None:
        """Wait until the other groups have drawn their pictures."""
        for _ in self.launch.wait_for(self.bar.total):
            stopping.check()
            self._show("waiting for other groups")

    def _show(self, stage: str) -> None:
        if self.bar.disable:
            return
        others = self.launch.drawn() - self.drawn if self.launch.num_groups > 1 else 0
        finished = self.drawn + others
        done = finished + self.current
        per_hour = 3600 * done / (time.perf_counter() - self.began)
        self.bar.set_description(f"{min(finished + 1, self.bar.total)} of {self.bar.total}, {stage}", refresh=False)
        self.bar.set_postfix_str(f"{per_hour:.3g} pictures/h", refresh=False)
        self.bar.update(done - self.bar.n)


def tell(message: str) -> None:
    """Write a message for the user on standard error, above the bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stderr):
        say(message)


def print_line(line: str) -> None:
    """Write a line on standard output, above the bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stdout):
        write_line(line, sys.stdout)
