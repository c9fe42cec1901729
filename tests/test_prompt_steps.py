"""Prompts that change from step to step, and sums of prompts: their syntax, and what every step reads and estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.models.editing import described, schedule, terms, texts
from cutdiff.models.prompts import named_loras, parse_weights
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.settings import Settings

# ---- Syntax

ODD_EVEN = [(i, "wet" if i % 2 else "dry") for i in range(1, 11)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a house", [(10, "a house")]),
        ("", [(10, "")]),
        # editing: whole steps, shares, and blanks beside them
        ("a [red:blue:3] house", [(3, "a red house"), (10, "a blue house")]),
        ("a [red :blue: 3 ] house", [(3, "a red  house"), (10, "a blue house")]),
        ("[red:blue:0.25]", [(2, "red"), (10, "blue")]),
        ("[red:blue:.5]", [(5, "red"), (10, "blue")]),
        ("[red:blue:1.0]", [(10, "red")]),
        ("[red:blue:1.5]", [(10, "red")]),
        ("[red:blue:1]", [(1, "red"), (10, "blue")]),
        ("[red:blue:1e0]", [(1, "red"), (10, "blue")]),
        ("[red:blue:0]", [(10, "blue")]),
        ("[red:blue:0.01]", [(10, "blue")]),
        ("[red:blue:-4]", [(10, "blue")]),
        ("[red:blue:10]", [(10, "red")]),
        ("[red:blue:99]", [(10, "red")]),
        (f"[red:blue:{'9' * 400}]", [(10, "red")]),
        # adding and taking away
        ("a[ red:3] house", [(3, "a house"), (10, "a red house")]),
        ("a[ red::3] house", [(3, "a red house"), (10, "a house")]),
        ("[:3]", [(3, ""), (10, "")]),
        # within each other, and with weights
        ("[a:[b:c:4]:2]", [(2, "a"), (4, "b"), (10, "c")]),
        ("[[a:b:2]:c:4]", [(2, "a"), (4, "b"), (10, "c")]),
        ("[a:b:2] [c:d:4]", [(2, "a c"), (4, "b c"), (10, "b d")]),
        ("[(a:1.2):[b]:3]", [(3, "(a:1.2)"), (10, "[b]")]),
        ("([a:b:3]:1.2)", [(3, "(a:1.2)"), (10, "(b:1.2)")]),
        ("[[[a]]:3]", [(3, ""), (10, "[[a]]")]),
        # alternation
        ("[wet|dry]", ODD_EVEN),
        ("[we|dr][t|y]", ODD_EVEN),
        ("[a|b|]", [(i, ("a", "b", "")[(i - 1) % 3]) for i in range(1, 11)]),
        ("[a|[b:c:4]]", [(i, "a" if i % 2 else "b" if i <= 4 else "c") for i in range(1, 11)]),
        ("[[wet|dry]:dry:10]", ODD_EVEN),
        # escapes, which stay for the weights
        (r"\[red:blue:3\]", [(10, r"\[red:blue:3\]")]),
        (r"[a\:b:c:3]", [(3, r"a\:b"), (10, "c")]),
        (r"[a\]:b:3]", [(3, r"a\]"), (10, "b")]),
        # no syntax
        ("[red]", [(10, "[red]")]),
        ("[red:blue]", [(10, "[red:blue]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:(3)]", [(10, "[a:b:(3)]")]),
        ("[a:b:3", [(10, "[a:b:3")]),
        ("a|b", [(10, "a|b")]),
        ("(a|b)", [(10, "(a|b)")]),
        # what is text around an edit leaves it an edit, and what is text within one leaves none
        ("(a [b:c:3]", [(3, "(a b"), (10, "(a c")]),
        ("[x [b:c:3]", [(3, "[x b"), (10, "[x c")]),
        ("((x][:y [b:c:3]", [(3, "((x][:y b"), (10, "((x][:y c")]),
        ("[x:(b]:3] [b:c:3]", [(3, "[x:(b]:3] b"), (10, "[x:(b]:3] c")]),
        ("[(x:y:z):b:3]", [(10, "[(x:y:z):b:3]")]),
        ("a | [b:c:3]", [(3, "a | b"), (10, "a | c")]),
        ("[a|b:c:3]", [(3, "a|b"), (10, "c")]),
    ],
)
def test_texts_of_ten_steps(prompt: str, parts: list[tuple[int, str]]) -> None:
    assert schedule(prompt, 10) == parts
    assert texts(prompt, 10) == [next(text for end, text in parts if step <= end) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red house", [("a red house", 1)]),
        ("a screen, 16:9", [("a screen, 16:9", 1)]),
        ("a AND b", [("a", 1), ("b", 1)]),
        ("a AND b:1.2", [("a", 1), ("b", 1.2)]),
        ("a : -0.5 AND b :2. AND c:.5", [("a", -0.5), ("b", 2), ("c", 0.5)]),
        ("(a:1.3) AND [b:c:0.5]", [("(a:1.3)", 1), ("[b:c:0.5]", 1)]),
        ("(a AND b)", [("(a", 1), ("b)", 1)]),
        ("a AND", [("a", 1), ("", 1)]),
        ("a AND b:1e3", [("a", 1), ("b:1e3", 1)]),
        ("a AND b:", [("a", 1), ("b:", 1)]),
        ("SAND and ANDES", [("SAND and ANDES", 1)]),
    ],
)
def test_terms(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert terms(prompt) == parts


@given(st.text(alphabet="ab[]():|\\12. "), st.integers(1, 7))
def test_every_string_has_a_text_at_every_step(prompt: str, num_steps: int) -> None:
    read = texts(prompt, num_steps)
    assert len(read) == num_steps
    for text in read:
        left = iter(prompt)
        assert all(character in left for character in text), "not in their order"


MEGABYTE = 1 << 20
LONG: dict[str, Callable[[int], str]] = {
    "blanks": lambda n: " " * n,
    "blanks before BREAK": lambda n: "a" + " " * n + "BREAK" + " " * n + "b",
    "digits": lambda n: "1" * n,
    "a weight of digits": lambda n: "(a:" + "1" * n,
    "a weight after blanks": lambda n: "(a:" + " " * n + "1" + " " * n + "x",
    "a step of digits": lambda n: "[a:b:" + "1" * n,
    "a term of digits": lambda n: "a AND b:" + "1" * n + "x",
    "LoRAs that do not end": lambda n: "<lora:" * (n // 6),
    "brackets": lambda n: "(" * n,
    "square brackets": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "edits": lambda n: "[a:" * (n // 6) + "b:2]" * (n // 6),
    "alternatives": lambda n: "[a|b]" * (n // 5),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_prompt_is_read_in_linear_time(name: str) -> None:
    """A quadratic reading of a megabyte takes hours."""
    prompt, began = LONG[name](MEGABYTE), time.process_time()
    described(prompt, 50)
    for text, _ in terms(named_loras(prompt)[0]):
        for part in {*texts(text, 50)}:
            parse_weights(part)
    assert time.process_time() - began < 20, "an idle core takes 1 to 3 s"


# ---- What a run reads


class Ear(Observer):
    """Keeps the pooled states of the rows with the prompt and of those without it, by their step."""

    def __init__(self) -> None:
        self.prompted: list[tuple[int, torch.Tensor]] = []
        self.negative: list[tuple[int, torch.Tensor]] = []

    def call(self, call: Call, prediction: torch.Tensor) -> None:
        self.prompted.append((call.step, call.inputs[3][call.prompted]))
        self.negative.append((call.step, call.inputs[3][~call.prompted]))


SIZE = {"height": 128, "width": 128}


@pytest.mark.parametrize("view_batch_size", [3, None])
@pytest.mark.parametrize("method", ["direct", "cutdiffusion", "demofusion", "magnify", "frecas", "upsample_guidance"])
def test_every_step_of_every_method_reads_its_own_text(
    tiny_model: Model, method: str, view_batch_size: int | None
) -> None:
    """Where a method goes through the schedule twice, its steps are counted anew."""
    ear, prompts = Ear(), ["a [red|blue] tent", "a [pink:purple:0.5] house"]
    options = {"method": method, "num_steps": 4, "negative_prompt": "[moon:3]", "view_batch_size": view_batch_size}
    list(cutdiff.denoise(tiny_model, prompts, observer=ear, **options, **SIZE))
    read = [texts(prompt, 4) for prompt in prompts]
    assert {step % 4 for step, _ in ear.prompted} == {0, 1, 2, 3}
    for step, pooled in ear.prompted:
        allowed = [tiny_model.text.encode([text[step % 4]]).pooled[0] for text in read]
        for row in pooled:
            assert any(torch.allclose(row, one, atol=1e-5) for one in allowed), f"step {step}"
    moon = tiny_model.text.encode(["moon"]).pooled
    for step, pooled in ear.negative:
        expected = moon if step % 4 == 3 else torch.zeros_like(moon)
        torch.testing.assert_close(pooled, expected.expand_as(pooled))


def test_a_text_that_does_not_change_is_read_once(tiny_model: Model) -> None:
    """The same object at every step is what lets keys and values stay."""
    run = prepare(tiny_model, "[a|b|a] tent AND [house:2]", Settings(num_steps=6))
    positive = run.denoiser.text_at
    assert positive(0).terms[0] is positive(2).terms[0] is positive(9).terms[0]
    assert positive(0).terms[1] is positive(1).terms[1]
    assert positive(1).terms[1] is not positive(2).terms[1]


# ---- Sums


def estimate(model: Model, prompt: str | list[str], x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
    """D's estimate of x0 at the first step, and the rows that it took."""
    run = prepare(model, prompt, Settings(num_steps=2, **SIZE, **options))
    denoised = run.denoiser(x, run.schedule.sigmas[0], 0)
    return denoised, run.denoiser.work.evaluations


@pytest.mark.parametrize("guidance", ["cfg,guidance_scale=3", "rescale,guidance_scale=3", "by_band,guidance_scale=3"])
def test_the_guidance_of_a_sum_is_added_up(tiny_model: Model, guidance: str) -> None:
    x = 10 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b, u = (estimate(tiny_model, text, x, guidance_scale=1.0)[0] for text in ("a tent", "a house", "a moon"))
    conditional = u + 1.0 * (a - u) - 0.5 * (b - u)
    settings = Settings(guidance=guidance)
    sums, rows = estimate(tiny_model, "a tent AND a house:-0.5", x, guidance=guidance, negative_prompt="a moon")
    torch.testing.assert_close(sums, settings.guidance(conditional, u, 14.6, 0), rtol=1e-4, atol=1e-4)
    assert rows == 3
    off, rows = estimate(tiny_model, "a tent AND a house:-0.5", x, guidance_scale=0.0, negative_prompt="a moon")
    torch.testing.assert_close(off, conditional, rtol=1e-4, atol=1e-4)
    assert rows == 3
    mean, rows = estimate(tiny_model, "a tent:0.25 AND a house:0.75", x, guidance_scale=1.0, negative_prompt="a moon")
    torch.testing.assert_close(mean, 0.25 * a + 0.75 * b, rtol=1e-4, atol=1e-4)
    assert rows == 2, "the negative estimate cancels out"


def test_pictures_of_a_batch_may_have_other_numbers_of_terms(tiny_model: Model) -> None:
    x = 10 * torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a tent AND a house:-0.5", "a red tree", "a AND b AND c:2"]
    together, _ = estimate(tiny_model, prompts, x)
    alone = torch.cat([estimate(tiny_model, prompt, x[i : i + 1])[0] for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["cutdiffusion", "demofusion", "magnify", "frecas", "scalecrafter", "freescale"])
def test_a_sum_of_one_prompt_with_itself_is_that_prompt(tiny_model: Model, method: str) -> None:
    """This holds for any number of items at once; the guidance of both halves is that of the whole."""
    options = {"method": method, "num_steps": 3, "seed": 5, **SIZE}
    plain = cutdiff.generate(tiny_model, "a red tent", **options)
    for view_batch_size in (None, 1):
        halves = cutdiff.generate(
            tiny_model, "a red tent:0.5 AND a red tent:0.5", view_batch_size=view_batch_size, **options
        )
        torch.testing.assert_close(halves.latents, plain.latents, rtol=1e-3, atol=1e-3)


# ---- Records, and what is refused


def test_a_record_tells_what_changes_and_a_plain_one_is_as_it_was(tiny_model: Model) -> None:
    def record(prompt: str, **options: Any) -> dict[str, Any]:
        return cutdiff.generate(tiny_model, prompt, method="direct", num_steps=4, **options).record

    assert "prompt_terms" not in record("a (red:1.2) house, 16:9", negative_prompt="x AND y")
    changing = record("a [red:blue:0.5] tent AND a house:0.5", negative_prompt="[moon|sun]")["prompt_terms"]
    assert changing == {
        "prompt": [{"weight": 1.0, "changes_after": [2]}, {"weight": 0.5, "changes_after": []}],
        "negative_prompt": [{"weight": 1.0, "changes_after": [1, 2, 3]}],
    }


@pytest.mark.parametrize("prompt", ["a [red|blue] tent", "a tent AND a house"])
def test_accdiffusion_has_words_of_one_prompt(tiny_model: Model, prompt: str) -> None:
    with pytest.raises(ValueError, match=r"^method=accdiffusion draws each view with words of one prompt that stays"):
        cutdiff.denoise(tiny_model, prompt, method="accdiffusion")


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "prompt_2"])
def test_python_loads_loras_with_the_model(tiny_model: Model, name: str) -> None:
    options = {"prompt": "a tent", name: "a tent <lora:tents:0.3>"}
    with pytest.raises(ValueError, match=rf"^{name} names <lora:tents:0.3>: load the model with loras="):
        cutdiff.denoise(tiny_model, **options)
