"""Runs of several ranks, each a fork of this process: `python ranked.py methods|runs MODEL FOLDER`.

The tests look at the files that they leave.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from processes import PATIENCE, kill_and_start_again, sampler, start, statuses
from tiny import with_nine

import cutdiff
import cutdiff.models.bands
import cutdiff.models.vae
from cutdiff.checkpoint.control import save_control
from cutdiff.checkpoint.random_model import randomise
from cutdiff.given.regions import Region
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.parallel.launch import joined
from cutdiff.settings import Settings
from cutdiff.specs import METHODS

SIZES = (1, 2, 5)
CONTROL = "control.safetensors"
VIEW_BATCHES = (1, 3, None)
OTHERS = {"pag": {"guidance": "pag"}, "regions": {"regions": [Region("a tent", (0, 0, 0.5, 1))], "method": "magnify"}}
"""Runs of more than a method, and their options."""
QUICK = ["--method", "multidiffusion", "--steps", "3", "--width", "128", "--height", "64"]


def methods(model: Path, folder: Path) -> None:
    """Draw with every method on `SIZES` ranks, decode in small bands, and save each rank's results in
    `folder`/SIZE-RANK.pt."""
    cutdiff.models.vae.CPU_LARGE_BYTES = 0
    cutdiff.models.vae.SCORE_BYTES = 4096
    cutdiff.models.bands.CPU_BAND_BYTES = 20_000
    network = ControlNet(ControlNetConfig(cutdiff.load(model).unet.config, (4, 4, 4, 8)))
    randomise(network, 0)
    save_control(folder / CONTROL, network)
    for size in SIZES:
        assert statuses(start(partial(draw_all, model, folder), size)) == [0] * size


def draw_all(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu", 1, 60.0) as launch:
        loaded, results = cutdiff.load(model), {}
        overflowing = cutdiff.load(model, dtype=torch.float16)
        overflowing.vae.decoder.conv_in.weight.mul_(1e4)
        settings = Settings(height=64, width=64, num_steps=1)
        result = cutdiff.generate(overflowing, "a", settings, ranks=launch.group)
        results["overflow"] = result.images, result.record["decoded_in"]
        own_model = {"inpainting": replace(loaded, unet=with_nine(loaded.unet))}
        picture = np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype="u1")
        redrawn = {"image": picture, "mask": np.tril(np.full((128, 96), 255, dtype="u1"))}
        hint = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
        controlled = {"control": folder / CONTROL, "control_image": hint}
        others = {"control": controlled, "mask": redrawn, "inpainting": redrawn, **OTHERS}
        for method in (*METHODS, *others):
            own = others.get(method, {"method": method})
            settings = Settings(**own, height=128, width=96, num_steps=2)
            narrow = {"stride": 2, "detail": "views"}
            settings = replace(settings, **{name: value for name, value in narrow.items() if settings.has(name)})
            for items in VIEW_BATCHES:
                result = cutdiff.generate(
                    own_model.get(method, loaded),
                    ["a red house", "b"],
                    settings,
                    ranks=launch.group,
                    view_batch_size=items,
                )
                results[method, items] = result.latents, result.images, result.record["network_evaluations"]
        torch.save(results, folder / f"{launch.world.size}-{launch.world.rank}.pt")
    sys.exit(0)


def runs(model: Path, folder: Path) -> None:
    """Run the command line and disturb it; `folder`/NAME has what each rank printed, and the exit statuses."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join("abcdefg"))
    common = ["--model", str(model), *QUICK, "--view-batch-size", "1"]
    several = [*common, "--prompts", str(prompts)]
    out = folder / "groups"
    grouped = [*several, "--log-json", "--out", str(out)]
    run(folder / "two groups", 4, [*grouped, "--data-parallel", "2"])
    shutil.copytree(out, folder / "groups before")
    for number in (2, 5, 6):
        next(out.glob(f"000{number}-*.png")).unlink()
    run(folder / "three groups", 3, [*grouped, "--data-parallel", "3"])
    prompts.write_text("\n".join("abcd"))
    left = kill_and_start_again(folder / "killed", 20, 2, [*several, "--rank-timeout", "10"])
    (folder / "killed" / "left.json").write_text(json.dumps(left))
    in_groups = [*several, "--rank-timeout", "10", "--data-parallel", "2"]
    left = kill_and_start_again(folder / "killed, groups", 10, 2, in_groups)
    (folder / "killed, groups" / "left.json").write_text(json.dumps(left))
    run(folder / "no model", 2, ["a", "--model", str(folder / "none"), "--out", str(folder / "nothing")])
    run(folder / "no such group", 3, [*common, "a", "--data-parallel", "2", "--out", str(folder / "nothing")])
    run(folder / "one device", 2, [*common, "a", "--device", "cuda:0", "--out", str(folder / "nothing")])
    run(folder / "alone", 2, ["a", *common, "--rank-timeout", "2", "--out", str(folder / "nothing")], kill_the_second)
    other = [*common, "--num-images", "2", "--out", str(folder / "nothing")]
    run(folder / "other prompts", 2, lambda rank: [*other, "ab"[rank]])
    mixed = folder / "mixed.txt"
    mixed.write_text('a\n{"prompt": "b", "height": 256, "width": 256}\nc')
    large = [*common, "--prompts", str(mixed), "--out"]
    run(folder / "undisturbed", 1, [*large, str(folder / "large")])
    for groups in (1, 2):
        out = folder / f"large, {groups}"
        arguments = [*large, str(out), "--data-parallel", str(groups)]
        run(folder / f"disk is full, {groups}", 2, partial(with_little_space, arguments))
        shutil.copytree(out, folder / f"large before, {groups}")
        run(folder / f"disk has space, {groups}", 2, arguments)
    for name, (size, disturb, options) in DISTURBED.items():
        endless = ["a", *common, "--num-images", "1000", "--out", str(folder / name / "pictures")]
        run(folder / name, size, [*endless, "--rank-timeout", "5", *options], disturb)


def run(
    folder: Path,
    size: int,
    arguments: Sequence[str] | Callable[[int], list[str]],
    disturb: Callable[[list[int]], None] | None = None,
) -> None:
    """Run the command line on `size` ranks, whose arguments may differ, and save statuses and seconds in `folder`.

    The ranks are disturbed after the first picture, or at once if the second is killed. The seconds are those from then
    until the first rank ends.
    """
    folder.mkdir()

    def sample() -> None:
        sampler(arguments(int(os.environ["RANK"])) if callable(arguments) else arguments)()

    children = start(sample, size, folder)
    first = folder / "0.out"
    last = time.monotonic() + PATIENCE
    while disturb not in (None, kill_the_second) and not (first.exists() and first.stat().st_size):
        assert time.monotonic() < last, f"no picture in {folder}"
        time.sleep(0.05)
    began = time.monotonic()
    if disturb is not None:
        disturb(children)
    ended = statuses(children[:1])
    seconds = time.monotonic() - began
    for child in children[1:] if disturb in STOPPING else ():
        os.kill(child, signal.SIGKILL)
    (folder / "ended.json").write_text(json.dumps({"status": ended + statuses(children[1:]), "seconds": seconds}))


def with_little_space(arguments: list[str], rank: int) -> list[str]:
    """A limit on the size of files stands for a full disk, which a picture of 256² exceeds."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    return arguments


def send(number: signal.Signals, children: list[int]) -> None:
    for child in children:
        os.kill(child, number)


def kill_the_second(children: list[int]) -> None:
    os.kill(children[1], signal.SIGKILL)


def stop_the_second(children: list[int]) -> None:
    os.kill(children[1], signal.SIGSTOP)


def stop_the_second_and_terminate_the_first(children: list[int]) -> None:
    stop_the_second(children)
    time.sleep(1)
    os.kill(children[0], signal.SIGTERM)


STOPPING = (stop_the_second, stop_the_second_and_terminate_the_first)
DISTURBED: dict[str, tuple[int, Callable[[list[int]], None], list[str]]] = {
    "terminated": (2, partial(send, signal.SIGTERM), []),
    "interrupted": (2, partial(send, signal.SIGINT), []),
    "hangs": (3, stop_the_second, []),
    "a group hangs": (2, stop_the_second, ["--data-parallel", "2", "--num-images", "10"]),
    "waits": (2, stop_the_second_and_terminate_the_first, ["--rank-timeout", "60"]),
}
"""The number of ranks, what happens to them, and the options of the run, by name."""

if __name__ == "__main__":
    {"methods": methods, "runs": runs}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
