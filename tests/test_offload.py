"""Text encoders that rest on the CPU, and are copied to the GPU only while they encode."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sample import main


def test_offload_needs_a_gpu(quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["a", "--model", str(quick_folder), "--offload", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(run) == 2
    assert capsys.readouterr().err.startswith(
        "cutdiff: --offload moves the text encoders to the CPU, where this run is"
    )


def test_encoders_are_copied_only_where_they_are_not(model: Model) -> None:
    here, elsewhere = model.text.on(torch.device("cpu")), model.text.on(torch.device("meta"))
    for original, shared, moved in zip(model.text.encoders, here.encoders, elsewhere.encoders, strict=True):
        assert original is not shared
        weights = original.state_dict()
        assert {key: w.data_ptr() for key, w in shared.state_dict().items()} == {
            key: w.data_ptr() for key, w in weights.items()
        }
        assert {key: (w.shape, w.is_meta) for key, w in moved.state_dict().items()} == {
            key: (w.shape, True) for key, w in weights.items()
        }


def test_a_copy_of_the_encoders_is_gone_when_it_was_used(model: Model) -> None:
    """It is gone at once, and not when garbage is next collected: a GPU would hold it until then."""
    copied = model.text.on(torch.device("cpu"))
    references = [weakref.ref(encoder) for encoder in copied.encoders]
    gc.disable()
    try:
        copied.encode(["a red house"])
        del copied
        assert [encoder() for encoder in references] == [None, None]
    finally:
        gc.enable()


def test_offloaded_encoders_say_the_same(model: Model) -> None:
    offloaded = model.text.offloaded()
    assert offloaded.encodes_on == torch.device("cpu")
    one = offloaded.encode(["a red house"])
    other = model.text.encode(["a red house"])
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.pooled, other.pooled)


@pytest.mark.gpu
def test_offloaded_encoders_leave_the_gpu() -> None:
    model = cutdiff.load(device="cuda")
    states = model.text.encode(["a red house"])
    before = torch.cuda.memory_allocated()
    model = replace(model, text=model.text.offloaded())
    freed = torch.cuda.memory_allocated()
    assert freed < before
    again = model.text.encode(["a red house"])
    assert torch.equal(again.context, states.context)
    del again
    assert torch.cuda.memory_allocated() == freed
