"""The training of the embedded transformer: its times, its beginning, and a folder that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.models.flux import FluxConfig
from cutdiff.scenes import world
from cutdiff.scenes.vocabulary import PART
from cutdiff.training import flow
from cutdiff.training.fit import Plan
from cutdiff.training.flow import CONFIG, started, times

SMALL = FluxConfig(
    latent_channels=4,
    num_layers=1,
    num_single_layers=1,
    num_heads=2,
    axes=(4, 4, 4),
    context_dim=CONFIG.context_dim,
    pooled_dim=CONFIG.pooled_dim,
    reads_guidance=False,
    native_size=16,
)


def train(folder: Path, steps: int, *more: str) -> int:
    """Train a small one from the command line; returns the exit status."""
    arguments = ["--work", str(folder / "work"), "--out", str(folder / "model"), "--device", "cpu"]
    arguments += ["--dtype", "float32", "--num-scenes", "64", "--batch", "3", "--steps", str(steps)]
    return flow.main([*arguments, *more])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "CONFIG", SMALL)


def test_times_are_logistic_of_normal_and_one_from_each_stratum() -> None:
    drawn = times(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    assert (drawn.diff() > 0).all()
    normal = torch.logit(drawn)
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    ends = times(torch.tensor([0.0, 1 - 2**-24]))
    assert 0 < ends[0] < ends[1] < 1


def test_a_network_that_is_started_predicts_nothing_and_can_learn() -> None:
    network = started(SMALL)
    given = torch.randn(2, 4, 16, 16), torch.full((2,), 500.0), torch.randn(2, 5, 64), torch.randn(2, 64)
    predicted = network(*given)
    assert not predicted.any()
    predicted.backward(torch.ones_like(predicted))
    assert network.proj_out.weight.grad is not None
    assert network.proj_out.weight.grad.any()


def test_what_is_trained_is_the_flow_of_the_scenes_and_parts_say_so(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the squared error of noise − x0: that of a network that predicts nothing is E|noise|² + E|x0|²."""
    heard: list[list[str]] = []
    losses: list[float] = []

    def fitted(name: str, module: Any, loss: Callable[[torch.Generator], dict[str, Tensor]], *rest: Any) -> None:
        losses.extend(loss(torch.Generator().manual_seed(i))["loss"].item() for i in range(20))
        raise OSError("enough")

    text = flow.make_flow_text

    def listening() -> Any:
        made = text()
        tokenize = type(made).tokenize
        monkeypatch.setattr(type(made), "tokenize", lambda self, each: (heard.append([*each]), tokenize(self, each))[1])
        return made

    monkeypatch.setattr(flow, "fit", fitted)
    monkeypatch.setattr(flow, "make_flow_text", listening)
    assert train(tmp_path, 1) == 1
    latents = torch.load(next((tmp_path / "work").glob("latents-*.pt")), weights_only=True)[0].float()
    assert sum(losses) / 20 == pytest.approx(1 + latents.square().mean().item(), rel=0.1)
    captions = [caption for each in heard for caption in each]
    parts = [caption for caption in captions if caption.startswith(f"{PART} a ")]
    empty = [caption for caption in captions if not caption]
    assert len(captions) == 60
    assert 4 < len(parts) < 30
    assert 0 < len(empty) < 20
    assert all(caption.startswith("a ") for caption in captions if caption and caption not in parts)


def test_one_that_was_stopped_goes_on_and_is_loaded_with_its_card(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frequent = lambda *steps, **rates: Plan(*steps, **{**rates, "checkpoint_every": 2, "log_every": 1})  # noqa: E731
    monkeypatch.setattr(flow, "Plan", frequent)
    assert train(tmp_path / "whole", 5) == 0
    captions, calls = world.captions, []

    def stopping(*arguments: Any) -> list[str]:
        calls.append(arguments)
        if len(arguments) == 2 and len(calls) == 5:
            raise OSError("stopped")
        return captions(*arguments)

    monkeypatch.setattr(world, "captions", stopping)
    assert train(tmp_path / "stopped", 5) == 1
    assert not (tmp_path / "stopped" / "model").exists()
    assert train(tmp_path / "stopped", 5) == 0
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    model = cutdiff.load(tmp_path / "whole" / "model")
    assert model.preferred == {"guidance_scale": 4.0}
    assert any(p.any() for p in model.unet.transformer_blocks.parameters())
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert f'begin with "{PART}"' in card
    assert all(digest in card for digest in model.hashes.values())
    capsys.readouterr()
    assert train(tmp_path / "whole", 6) == 2
    assert "holds another training" in capsys.readouterr().err


def test_a_vae_of_other_channels_is_refused_before_anything_is_written(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flow, "CONFIG", FluxConfig(latent_channels=16))
    assert train(tmp_path, 1) == 1
    assert "4 channels" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
