"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

from browser import Browser, opened_browser
from own import OwnModules
from refusal import CommandLine
from tiny import QUICK_UNET, QUICK_VAE, Tiny, put_in_cache, random_model

import cutdiff
from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.families import SDXL
from cutdiff.checkpoint.model import Model
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.scenes.vocabulary import WIDTH, make_text_encoders

SLOW = Path(__file__).with_name("slow.txt")
collect_ignore_glob = [] if find_spec("triton") else ["test_kernels*.py", "test_fused.py"]  # there is none for macOS
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that kernels run on: interpreted on the CPU, compiled on a GPU."""
    from triton import knobs  # there is none for macOS

    if request.param == "cpu" and not knobs.runtime.interpret:
        pytest.skip("kernels are compiled in this process: the interpreter needs one of its own")
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow.txt, which were measured to take long, as slow: single cases, or all of a function."""
    slow = {line for line in SLOW.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name in slow or name.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


def pytest_sessionstart() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // workers))


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A random model that draws in hundredths of a second: native size 8 latents of 8 pixels, the scenes' words."""
    torch.manual_seed(0)
    unet = UNet(replace(QUICK_UNET, context_dim=2 * WIDTH, pooled_dim=WIDTH))
    vae = VAE(replace(QUICK_VAE, scaling_factor=0.5))
    return Model(
        unet=unet.eval().requires_grad_(False),
        vae=vae.eval().requires_grad_(False),
        text=make_text_encoders(),
        noise=NoiseConfig(),
        zeros_for_empty_negative=True,
        source="random",
        files={},
    )


@pytest.fixture(scope="session")
def quick_folder(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny_model`."""
    folder = tmp_path_factory.mktemp("models") / "quick"
    save_folder(
        folder,
        unet=tiny_model.unet,
        vae=tiny_model.vae,
        text=tiny_model.text,
        noise=tiny_model.noise,
        zeros_for_empty_negative=True,
    )
    return folder


@pytest.fixture(scope="session")
def model() -> Model:
    """The embedded model."""
    return cutdiff.load()


@pytest.fixture
def command_line(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The sampler's command line, after all that it imports."""
    return CommandLine(tmp_path / "out", capsys)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for the pages that runs leave."""
    with opened_browser() as window:
        yield window


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnModules]:
    """A folder for modules of one's own."""
    modules = OwnModules(tmp_path / "own modules")
    modules.folder.mkdir()
    monkeypatch.syspath_prepend(modules.folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield modules
    modules.forget()


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A random model of SDXL's shape, to be written and read."""
    return random_model(SDXL)


@pytest.fixture(scope="session")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def single_file(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(tiny.original(), path)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer_in_cache(folder: Path, empty_cache: Path) -> None:
    put_in_cache(empty_cache, "openai/clip-vit-large-patch14", folder / "tokenizer")
