"""The compiled network: the same picture, compiled at most twice for a whole run and not again for the next."""

from __future__ import annotations

import pytest
import torch
from tiny import on
from torch._dynamo.utils import counters

import cutdiff
from cutdiff.bench.parity import full_precision
from cutdiff.checkpoint.model import Model
from cutdiff.models import compiled
from cutdiff.models.inside import replaced
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
    assert 1 <= graphs <= 2, "for 4 patches, 4 views and the ninth: with a number of rows, and with any number"
    cutdiff.generate(tiny_model, "a blue tree at night", compile=True, **options | {"view_batch_size": 3})
    assert counters["stats"]["unique_graphs"] == graphs, "another prompt and batch compile nothing"


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
        with full_precision():
            plain = cutdiff.generate(model, prompt, **options)
            graphs = cutdiff.generate(model, prompt, compile=True, cuda_graphs=True, **options)
        torch.testing.assert_close(graphs.latents, plain.latents, rtol=1e-3, atol=1e-3)
