"""The compiled network: the same picture, compiled once for each number of rows and not again for the next run."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from tiny import on
from torch._dynamo.utils import counters

import cutdiff
from cutdiff.bench.parity import full_precision
from cutdiff.checkpoint.model import Model
from cutdiff.models import compiled
from cutdiff.models.inside import replaced
from cutdiff.models.layers import ResnetBlock
from cutdiff.models.unet import TransformerBlock
from cutdiff.specs import METHODS, resolve

CHANGING = tuple(name for name in METHODS if getattr(resolve("method", name), "changes_network", False))


def test_a_compiled_run_draws_the_same_and_compiles_once(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # what dynamo captures; what a compiler makes of it is not ours
    torch.compiler.reset()
    counters.clear()
    options = {"num_steps": 4, "view_batch_size": 4, "seed": 3}
    plain, run = (cutdiff.generate(tiny_model, "a red house", compile=compile, **options) for compile in (False, True))
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(run.latents, plain.latents, rtol=1e-4, atol=1e-4)
    assert run.record["network_evaluations"] == plain.record["network_evaluations"]
    blocks = [module for module in tiny_model.unet.modules() if isinstance(module, ResnetBlock | TransformerBlock)]
    kinds = {tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}
    counts = 2  # four patches or views, and the ninth view
    assert len(kinds) < graphs <= counts * len(blocks), "blocks of one shape share a graph at one resolution"
    cutdiff.generate(tiny_model, "a blue tree at night", compile=True, **options)
    assert counters["stats"]["unique_graphs"] == graphs, "another run with another prompt compiles nothing"


def test_compiling_leaves_the_network_alone_and_shares_its_weights(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch.compiler.reset()
    unet = tiny_model.unet
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.config.context_dim)
    inputs = (x, torch.full((2,), 5.0), context, torch.randn(2, unet.config.pooled_dim), torch.zeros(2, 6))
    bias = unet.get_parameter("conv_out.bias")
    with torch.no_grad():
        before = unet(*inputs)
        for parts in ("blocks", "whole"):
            run = compiled.compiled(unet, parts=parts)
            torch.testing.assert_close(run(*inputs), before)
            torch.testing.assert_close(run(*inputs[:2], unet.read(context), *inputs[3:]), before)
            bias.add_(1)
            torch.testing.assert_close(run(*inputs), before + 1)
            bias.sub_(1)
        torch.testing.assert_close(unet(*inputs), before)
    assert all(module._compiled_call_impl is None for module in unet.modules())


def test_compiling_keeps_the_hooks_of_the_network(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of an object that cannot be copied is called on that object."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")

    class Recorder:
        def __init__(self) -> None:
            self.lock, self.calls = threading.Lock(), 0

        def hook(self, *_: object) -> None:
            self.calls += 1

    recorder = Recorder()
    with tiny_model.unet.conv_out.register_forward_hook(recorder.hook):
        record = cutdiff.generate(tiny_model, "a red house", method="direct", num_steps=2, compile=True).record
    assert recorder.calls == 2
    assert record["network_evaluations"] == 4


@pytest.mark.parametrize("method", CHANGING)
def test_a_method_that_changes_the_network_is_not_compiled(tiny_model: Model, method: str) -> None:
    with pytest.raises(ValueError, match=f"compile=True is not for {method}, which changes the network"):
        cutdiff.denoise(tiny_model, "a red house", method=method, compile=True)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in CHANGING])
def test_the_other_methods_change_nothing_in_the_network(tiny_model: Model, method: str) -> None:
    """They change neither an attribute of a module nor a hook, which a compiler might not see."""
    unet = tiny_model.unet
    before = [dict(vars(module)) for module in unet.modules()]

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        seen = [dict(vars(module)) for module in unet.modules()]
        seen[0].pop("forward")
        assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(seen, before, strict=True))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
        return type(unet).forward(unet, *inputs)

    with replaced(unet, forward=forward):
        cutdiff.generate(tiny_model, "a red house", method=method, num_steps=2)


@pytest.mark.gpu
def test_cuda_graphs_draw_the_same(tiny_model: Model) -> None:
    """A stage of full batches, and one whose last batch is smaller, are recorded, and replayed with another prompt."""
    torch.compiler.reset()
    model = on("cuda", tiny_model)
    for prompt in ("a red house", "a blue tree at night"):
        options = {"num_steps": 4, "view_batch_size": 4, "seed": 3}
        with full_precision(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)  # inductor's advice to give up digits
            plain = cutdiff.generate(model, prompt, **options)
            graphs = cutdiff.generate(model, prompt, compile=True, cuda_graphs=True, **options)
        torch.testing.assert_close(graphs.latents, plain.latents, rtol=1e-3, atol=1e-3)
