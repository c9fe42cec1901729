"""Several processes draw the pictures that one draws, and whatever happens to one of them, they end and say why."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import ENVIRONMENT, contents, free_port
from ranked import QUICK, SIZES
from torch.distributed import HashStore

from cutdiff.parallel.launch import Launch
from cutdiff.parallel.process import Ended, RankLost
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.parallel.watch import Watch
from cutdiff.sample import main
from cutdiff.specs import METHODS

Drawn = dict[Any, Any]


@given(num=st.integers(0, 100), size=st.integers(1, 20))
def test_all_have_a_part_and_none_more_than_one_unit_more(num: int, size: int) -> None:
    starts = Ranks(0, size).starts(num)
    parts = [b - a for a, b in pairwise(starts)]
    assert (starts[0], starts[-1], len(parts)) == (0, num, size)
    assert set(parts) <= {num // size, -(-num // size)}
    assert parts[-1] == max(parts)


def look_at(what: str, model: Path, folder: Path) -> Path:
    script = Path(__file__).with_name("ranked.py")
    command = [sys.executable, str(script), what, str(model), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


# ---- The same picture


@pytest.fixture(scope="module")
def drawn(quick_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Drawn]]:
    """The results of each rank for every method and view batch, by the number of ranks."""
    out = look_at("methods", quick_folder, tmp_path_factory.mktemp("methods"))
    return {size: [torch.load(out / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.mark.parametrize("method", [*METHODS, "pag", "mask", "inpainting", "regions", "control"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_every_rank_has_the_picture_of_one_process(size: int, method: str, drawn: dict[int, list[Drawn]]) -> None:
    """They agree to the bit if network calls have the same items. Two pictures in one phase are fewer items than five
    ranks."""
    alone, ranks = drawn[1][0], drawn[size]
    for items in (1, 3):
        latents, images, _ = alone[method, items]
        for rank in ranks:
            assert torch.equal(rank[method, items][0], latents)
            assert torch.equal(rank[method, items][1], images)
    latents, images, _ = alone[method, None]
    for rank in ranks:
        torch.testing.assert_close(rank[method, None][0], latents, rtol=1e-4, atol=3e-4 * latents.abs().max().item())
        assert torch.equal(rank[method, None][0], ranks[0][method, None][0])
        assert torch.equal(rank[method, None][1], ranks[0][method, None][1])
        assert all(rank[method, items][2] == alone[method, items][2] for items in (1, 3, None))


def test_a_vae_that_overflows_decodes_again_in_float32(drawn: dict[int, list[Drawn]]) -> None:
    for ranks in drawn.values():
        for rank in ranks:
            images, dtype = rank["overflow"]
            assert dtype == "float32"
            torch.testing.assert_close(images, drawn[1][0]["overflow"][0])


def test_two_launchers_draw_one_picture(quick_folder: Path, tmp_path: Path) -> None:
    """Two torchruns meet as on two machines. Only the first rank prints and writes."""
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    run = ["-m", "cutdiff.sample", "a", "--model", str(quick_folder), *QUICK, "--view-batch-size", "1", "-v", "--out"]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *nodes, *run, str(tmp_path / "two")],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [launcher.communicate(timeout=120) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    paths, errors = ("".join(streams) for streams in zip(*printed, strict=True))
    assert paths.splitlines() == [str(tmp_path / "two" / "multidiffusion-128x64-seed0.png")]
    # Of three views with two rows of 4×8×8 values each, the first rank evaluates one: the ideal.
    assert re.findall(r"2 ranks, ([\d.]+) kB a step into the first", errors) == [f"{2 * 2 * 4 * 8 * 8 * 4 / 1e3:.1f}"]
    subprocess.run([sys.executable, *run, str(tmp_path / "one")], env=ENVIRONMENT, check=True, capture_output=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ---- Sets of pictures, and faults


def test_lines_that_failed_reach_the_first_of_several_groups() -> None:
    several = Launch(ALONE, ALONE, num_groups=2, store=HashStore())
    assert several.failures() == set()
    for line in (7, 3):
        several.failed(line)
    assert several.failures() == {3, 7}
    alone = Launch(ALONE, ALONE)
    alone.failed(7)
    assert alone.failures() == set()


@pytest.fixture(scope="module")
def runs(quick_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return look_at("runs", quick_folder, tmp_path_factory.mktemp("runs"))


def ended(folder: Path) -> tuple[list[int], list[str], list[str], float]:
    """The exit status, the output and the errors of each rank, and the seconds until the first rank ended."""
    end = json.loads((folder / "ended.json").read_text())
    out, err = ([path.read_text() for path in sorted(folder.glob(f"*.{kind}"))] for kind in ("out", "err"))
    return end["status"], out, err, end["seconds"]


def test_groups_take_different_prompts(runs: Path) -> None:
    status, printed, errors, _ = ended(runs / "two groups")
    assert (status, errors) == ([0] * 4, [""] * 4)
    assert printed[1] == printed[3] == ""
    lines = [json.loads(line) for line in "".join(printed).splitlines()]
    assert Counter((line["line"], line["state"]) for line in lines) == {(n, "drawn"): 1 for n in range(1, 8)}


def test_another_number_of_groups_draws_what_is_missing(runs: Path) -> None:
    status, printed, errors, _ = ended(runs / "three groups")
    assert (status, errors) == ([0] * 3, ["cutdiff: 4 of 7 pictures are finished already\n", "", ""])
    lines = [json.loads(line) for line in "".join(printed).splitlines()]
    states = {n: "drawn" if n in (2, 5, 6) else "finished" for n in range(1, 8)}
    assert Counter((line["line"], line["state"]) for line in lines) == Counter(states.items())
    assert contents(runs / "groups") == contents(runs / "groups before")


def test_killed_anywhere_and_started_again(runs: Path) -> None:
    """One of two ranks is killed at twenty seeded moments. The other one ends, and after a second start the folder is
    that of an undisturbed run."""
    left = json.loads((runs / "killed" / "left.json").read_text())
    assert len(left) == 20
    assert len({len(names) for _, names in left}) > 1, "all were killed at the same picture"
    killed = [sorted(status) for status, _ in left]
    assert sum(status == [-signal.SIGKILL, 1] for status in killed) >= 10
    assert {tuple(status) for status in killed} <= {(-signal.SIGKILL, 1), (-signal.SIGKILL, 0), (0, 0)}
    whole = contents(runs / "killed" / "whole")
    assert len(whole) == 8
    for seed in range(20):
        assert contents(runs / "killed" / f"seed {seed}") == whole


def test_a_group_is_killed_anywhere_and_started_again(runs: Path) -> None:
    """One of two groups is killed at ten seeded moments. The other one may draw what is left, and ends too."""
    left = json.loads((runs / "killed, groups" / "left.json").read_text())
    assert len(left) == 10
    assert sum(-signal.SIGKILL in status for status, _ in left) >= 5
    assert {tuple(sorted(status)) for status, _ in left} <= {(-signal.SIGKILL, 1), (-signal.SIGKILL, 0), (0, 0)}
    for _, names in left:
        assert {name.replace(".png", ".json") for name in names} <= {*names}
    whole = contents(runs / "killed, groups" / "whole")
    assert len(whole) == 8
    for seed in range(10):
        assert contents(runs / "killed, groups" / f"seed {seed}") == whole


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [("terminated", 143, "cutdiff: terminated\n"), ("interrupted", 1, "cutdiff: interrupted\n")],
)
def test_signals(name: str, status: int, message: str, runs: Path) -> None:
    statuses, _, errors, seconds = ended(runs / name)
    assert (statuses, errors) == ([status] * 2, [message, ""])
    assert seconds < 10
    assert {path.suffix for path in (runs / name / "pictures").iterdir()} == {".png", ".json"}


def test_torch_is_silent_about_a_lost_store() -> None:
    code = """if True:
        from cutdiff.cli.ending import exit_status

        def run():
            import torch.distributed as dist

            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
            client.set("key", "value")
            del server
            for _ in range(10):  # the first messages may still be taken by the connection
                client.set("key", "value")

        exit_status(run, [])
    """
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("cutdiff: the run failed: DistNetworkError")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_full_disk(groups: int, runs: Path) -> None:
    """If there are two groups, the other one draws what it can, and ends too."""
    whole, name = contents(runs / "large"), "0002-multidiffusion-256x256-seed0.png"
    status, printed, errors, seconds = ended(runs / f"disk is full, {groups}")
    expected = f"{name} cannot be written (File too large): free space, or change --out"
    assert [end for end, error in zip(status, errors, strict=True) if expected in error] == [1]
    assert status[0] == 1
    assert seconds < 30
    before = contents(runs / f"large before, {groups}")
    assert before.items() <= {key: value for key, value in whole.items() if not key.startswith("0002")}.items()
    assert {Path(line).name for line in "".join(printed).splitlines()} == {key for key in before if "png" in key}
    assert ended(runs / f"disk has space, {groups}")[0] == [0, 0]
    assert contents(runs / f"large, {groups}") == whole


def test_ranks_that_do_not_meet(runs: Path) -> None:
    status, _, errors, _ = ended(runs / "alone")
    message = "not all of 2 processes met within 4 s (twice --rank-timeout): start all of them"
    assert (status, errors[0]) == ([1, -signal.SIGKILL], f"cutdiff: {message}\n")


WHERE = r"(after step \d of 3 \(views\)|before the first step) of multidiffusion-128x64-seed\d+\.png"
REMEDY = re.escape(": nothing for 5 s (--rank-timeout); start again to draw what is missing\n")


def test_a_rank_that_hangs_is_named_with_its_step(runs: Path) -> None:
    status, _, errors, _ = ended(runs / "hangs")
    assert status[0] == 1
    assert not any("cutdiff:" in error for error in errors[1:]), (
        "one says it; the store of torch may add that it is gone"
    )
    assert re.fullmatch(f"cutdiff: rank 1 hangs {WHERE}{REMEDY}", errors[0]), errors


@pytest.mark.parametrize(
    ("waited", "said", "error"),
    [
        (6.0, 1, Ended),  # another has said it before
        (6.0, None, Ended),  # the store is gone, with the first rank
        (6.0, 0, RankLost),  # nobody has
        (1.0, None, RankLost),  # too early for a hang: it was killed
    ],
)
def test_a_rank_whose_peers_vanish_speaks_where_no_other_did(
    waited: float, said: int | None, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 10 seconds."""

    class Store:
        def add(self, key: str, more: int) -> int:
            if said is None:
                raise RuntimeError("connection reset")
            return said + more

    def vanished(*args: object, **options: object) -> None:
        watch.waiting_since = time.monotonic() - waited
        raise RuntimeError("connection closed by peer")

    watch = Watch(Store(), 1, range(2), limit=10.0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", vanished)
    with pytest.raises(error):
        Ranks(1, 2, watch=watch).values(0)


def test_a_group_that_hangs_is_named_by_one_that_has_finished(runs: Path) -> None:
    status, _, errors, _ = ended(runs / "a group hangs")
    assert status == [1, -signal.SIGKILL]
    assert re.fullmatch(f"cutdiff: rank 1 hangs {WHERE}{REMEDY}", errors[0]), errors


def test_a_signal_reaches_a_rank_that_waits(runs: Path) -> None:
    status, _, errors, seconds = ended(runs / "waits")
    assert (status, errors) == ([143, -signal.SIGKILL], ["cutdiff: terminated\n", ""])
    assert seconds < 10


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("no model", [2, 1], "none does not exist"),
        ("no such group", [2, 1, 1], "--data-parallel 2 does not divide the 3 processes of this run: start a multiple"),
        ("other prompts", [1, 1], "rank 1 was told of other prompts or options: tell all the same"),
        ("one device", [2, 1], "--device cuda:0 is one for all processes: give --device cuda, and each takes its own"),
    ],
)
def test_what_all_find_the_first_says(name: str, status: list[int], message: str, runs: Path) -> None:
    statuses, _, errors, _ = ended(runs / name)
    assert statuses == status
    assert message in errors[0]
    assert errors[0].count("\n") == 1
    assert set(errors[1:]) == {""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-parallel", "0"], "--data-parallel 0 does not divide the 1 processes of this run: start a multiple"),
        (["--rank-timeout", "0"], "argument --rank-timeout: '0' is no number of seconds above 0"),
        (["--rank-timeout", "nan"], "argument --rank-timeout: 'nan' is no number of seconds above 0"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
