"""Bad input: prompts and options. One that cannot be used gets one line and status 2, and nothing is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from refusal import CommandLine

from cutdiff.sample import main

QUICK = ["--steps", "1", "--width", "128", "--height", "128", "--method", "direct"]

OF_DIRECT = (
    "is no option of method direct (none), solver euler (none), schedule model (none) or guidance cfg (guidance_scale)"
)
WITH_VIEWS = "multidiffusion, upsample_guidance, cutdiffusion, demofusion, accdiffusion, magnify"

PROMPTS = {
    "empty": "",
    "a space": " ",
    "10,000 tokens": "red " * 10_000,
    "10,000 tokens in brackets": "(red " * 10_000,
    "emoji": "🎈 a balloon, naïve — 气球 👩‍👩‍👧",
    "(x:nan)": "(x:nan)",
    "numbers without end": "(red:nan) (blue:1e400) (house:99999999999)",
    "((((": "((((",
    "))))": "))))",
    "weight 0": "(red:0)",
    "a backslash": "\\",
    "breaks alone": "BREAK BREAK",
    "looks like a path": "outputs/picture.png",
    "looks like a path above": "../../picture",
    "looks like an option": "--help",
    "looks like a record": "a tent\nNegative prompt: a house",
    "tokens by name": "<|endoftext|> a tent <|startoftext|>",
    "unprintable": "\x07\x1b[31m red",
}
"""Prompts that are drawn."""


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_is_drawn_and_kept_as_typed(name: str, tmp_path: Path) -> None:
    prompt = PROMPTS[name]
    assert main([*QUICK, "--out", str(tmp_path / "out"), "--", prompt]) == 0
    sidecar, picture = sorted((tmp_path / "out").iterdir())
    assert [*tmp_path.iterdir()] == [tmp_path / "out"], "no prompt is taken for a path"
    with Image.open(picture) as image:
        text = image.info["parameters"]
    assert json.loads(sidecar.read_text())["prompt"] == prompt
    assert text.startswith(prompt)


REFUSED_PROMPTS: dict[str, tuple[list[str], str]] = {
    "lone surrogate": (["a house \udcff"], r"the prompt 'a house \udcff' is not valid UTF-8: check the terminal's"),
    "lone surrogate, negative": (["--negative-prompt", "\ud800"], r"the prompt '\ud800' is not valid UTF-8"),
    "lone surrogate, second": (["--prompt-2", "\ud800"], r"the prompt '\ud800' is not valid UTF-8"),
    "NUL": (["a\0b"], r"the prompt 'a\x00b' holds a NUL, which a PNG's text cannot hold: leave it out"),
    "NUL, negative": (["--negative-prompt", "\0"], r"the prompt '\x00' holds a NUL"),
    "second for one": (["--method", "accdiffusion", "--prompt-2", "a tent"], "--prompt-2 'a tent' is not for accdiff"),
    "two places": (
        ["a tent", "--prompts", "nowhere"],
        "--prompts nowhere takes the place of PROMPT 'a tent': give one",
    ),
    "two places, empty": (["", "--prompts", "nowhere.txt"], "--prompts nowhere.txt takes the place of PROMPT ''"),
    "looks like an option": (
        ["--foo"],
        "--foo is no option: did you mean '--out'? (see --help; a prompt that begins with - comes last, after --",
    ),
    "looks like a short option": (["-x"], "-x is no option (see --help; a prompt that begins with -"),
    "looks like two short options": (
        ["-hat"],
        "argument -h/--help: ignored explicit argument 'at' (see --help; a prompt that begins",
    ),
    "looks like an option, negative": (
        ["--negative-prompt", "-ugly"],
        "argument --negative-prompt: expected one argument (see --help; a value that begins with -",
    ),
    "file missing": (
        ["--prompts", "nowhere.txt"],
        "--prompts nowhere.txt does not exist: check the path",
    ),
    "folder for a file": (["--prompts", "."], "--prompts . is a folder where a file belongs: name a file inside it"),
    "device for a file": (
        ["--prompts", "/dev/zero"],
        "--prompts /dev/zero is a device, a pipe or a socket: only regular files are read",
    ),
}

SAMPLING: dict[str, tuple[list[str], str]] = {
    "size 0": (["--height", "0"], "--height 0 must be a positive multiple of 8, at most 32768"),
    "size -8": (["--height", "-8"], "--height -8 must be a positive multiple of 8"),
    "size 12": (["--height", "12"], "--height 12 must be a multiple of 8; try 8"),
    "size 100": (["--width", "100"], "--width 100 must be a multiple of 8; try 96 or 104"),
    "size 1,000,000": (["--width", "1000000"], "--width 1000000 must be a positive multiple of 8, at most 32768"),
    "size 12.5": (["--width", "12.5"], "argument --width: 12.5 must be a whole number"),
    "trace every 0": (
        ["--trace", "--trace-every", "0"],
        "argument --trace-every: 0 must be a whole number in 1 … 100000",
    ),
    "trace's part alone": (["--trace-every", "2"], "--trace-every is a part of --trace: give that, too"),
    "trace's decoding alone": (["--trace-decode"], "--trace-decode is a part of --trace: give that, too"),
    "trace's data alone": (["--trace-data"], "--trace-data is a part of --trace: give that, too"),
    "stride 0": (["--stride", "0"], "argument --stride: 0 must be a whole number at least 1"),
    "stride -1": (["--stride", "-1"], "argument --stride: -1 must be a whole number at least 1"),
    "stride > window": (["--stride", "17"], "--stride 17 must not exceed the window of 16 latents"),
    "stride without views": (
        ["--stride", "8", "--method", "direct"],
        f"--stride {OF_DIRECT}, but of {WITH_VIEWS}",
    ),
    "structure fraction without a detail stage": (
        ["--structure-fraction", "0.5", "--method", "direct"],
        f"--structure-fraction {OF_DIRECT}, but of cutdiffusion, magnify",
    ),
    "steps 0": (["--steps", "0"], "argument --steps: 0 must be a whole number at least 1"),
    "steps -1": (["--steps", "-1"], "argument --steps: -1 must be a whole number at least 1"),
    "steps 1001": (["--steps", "1001"], "--steps 1001 must be between 1 and the 1000 timesteps"),
    "steps many": (["--steps", "many"], "argument --steps: 'many' must be a whole number at least 1 (see --help)"),
    "guidance NaN": (["--guidance-scale", "nan"], "argument --guidance-scale: 'nan' must be a finite number"),
    "guidance of 400 digits": (["--guidance-scale", "1" + "0" * 400], "argument --guidance-scale: "),
    "guidance inf": (["--guidance-scale", "inf"], "argument --guidance-scale: 'inf' must be a finite number"),
    "guidance past float32": (["--guidance-scale", "1e39"], "argument --guidance-scale: 1e+39 must be a finite number"),
    "guidance -inf": (["--guidance-scale=-inf"], "argument --guidance-scale: '-inf' must be a finite number"),
    "guidance NaN, detail": (
        ["--detail-guidance-scale", "nan"],
        "argument --detail-guidance-scale: 'nan' must be a finite number",
    ),
    "eta > 1": (["--eta", "1.5", "--solver", "ddim"], "argument --eta: 1.5 must be a finite number in 0 … 1"),
    "eta NaN": (["--eta", "nan", "--solver", "ddim"], "argument --eta: 'nan' must be a finite number in 0 … 1"),
    "eta without ddim": (
        ["--eta", "0.5"],
        "--eta is no option of method cutdiffusion (size_conditioning, stride, view_weights, overlaps, "
        "structure_fraction, structure, interaction, detail_guidance_scale, upsample_guidance, upsampling), solver "
        "euler (none), schedule model (none) or guidance cfg (guidance_scale), but of ddim, euler_ancestral",
    ),
    "seed -1": (["--seed", "-1"], "--seed -1 must lie in 0 … 2⁶⁴ − 1"),
    "seed 2^64": (["--seed", str(2**64)], f"--seed {2**64} must lie in 0 … 2⁶⁴ − 1"),
    "seed 2^64 of the last": (["--seed", str(2**64 - 1), "--num-images", "2"], f"--seed {2**64} must lie in 0"),
    "batch 0": (["--view-batch-size", "0"], "argument --view-batch-size: 0 must be a whole number at least 1"),
    "batch 0 of pictures": (["--num-images", "0"], "argument --num-images: 0 must be a whole number in 1 … 100000"),
    "structure fraction NaN": (
        ["--structure-fraction", "nan"],
        "argument --structure-fraction: 'nan' must be a finite number in 0 … 1",
    ),
    "structure fraction 1.5": (
        ["--structure-fraction", "1.5"],
        "argument --structure-fraction: 1.5 must be a finite number in 0 … 1",
    ),
    "cosine scales, two": (
        ["--method", "demofusion", "--cosine-scales", "3", "1"],
        "argument --cosine-scales: expected 3 arguments",
    ),
    "cosine scale -1": (
        ["--method", "demofusion", "--cosine-scales", "3", "1", "-1"],
        "argument --cosine-scales: 3, 1, -1 must be 3 values, each a finite number at least 0",
    ),
    "cosine scales of another method": (
        ["--cosine-scales", "3", "1", "1"],
        "--cosine-scales is no option of method cutdiffusion (size_conditioning, stride, view_weights, overlaps, ",
    ),
    "guidance interval, reversed": (
        ["--guidance-interval", "0.6", "0.4"],
        "--guidance-interval (0.6, 0.4) must be two shares, 0 ≤ from ≤ to ≤ 1",
    ),
    "guidance interval NaN": (
        ["--guidance-interval", "0", "nan"],
        "argument --guidance-interval: 0, 'nan' must be 2 values, each a finite number in 0 … 1",
    ),
    "word threshold 2": (
        ["--method", "accdiffusion", "--word-threshold", "2"],
        "argument --word-threshold: 2 must be a finite number in 0 … 1",
    ),
    "clip skip 0": (["--clip-skip", "0"], "--clip-skip 0 must lie in 1 … 3"),
    "clip skip 4": (["--clip-skip", "4"], "--clip-skip 4 must lie in 1 … 3"),
    "clip skip two": (["--clip-skip", "two"], "argument --clip-skip: 'two' must be a whole number"),
}
NAMES: dict[str, tuple[list[str], str]] = {
    "method": (["--method", "cutdifusion"], "did you mean 'cutdiffusion'?"),
    "method like none": (["--method", "zzz"], "--method 'zzz' is not one of direct, "),
    "solver": (["--solver", "eulr"], "--solver 'eulr' is not one of euler, ddim, "),
    "solver, near": (["--solver", "eulr"], "did you mean 'euler'?"),
    "schedule": (["--schedule", "karas"], "did you mean 'karras'?"),
    "guidance": (["--guidance", "resale"], "did you mean 'rescale'?"),
    "module": (
        ["--method", "nowhere:Mine"],
        "--method 'nowhere:Mine': there is no module 'nowhere' where Python looks",
    ),
    "object": (["--solver", "json:Mine"], "--solver 'json:Mine': the module json has no 'Mine'"),
    "option of a spec": (["--method", "magnify,strid=4"], "did you mean 'stride'?"),
    "value of a spec": (["--method", "magnify,stride=x"], "--stride 'x' must be a whole number at least 1 or None"),
    "no spec": (
        ["--method", "magnify,stride"],
        "--method 'magnify,stride' is no spec, for 'stride': give NAME,option=",
    ),
    "interaction": (["--interaction", "chanel"], "did you mean 'channel'?"),
    "size conditioning": (["--size-conditioning", "nativ"], "did you mean 'native'?"),
    "prediction type": (["--prediction-type", "epsilo"], "did you mean 'epsilon'?"),
    "timestep spacing": (["--timestep-spacing", "trail"], "did you mean 'trailing'?"),
    "backend": (["--backend", "tritn"], "did you mean 'triton'?"),
    "dtype": (["--dtype", "float23"], "did you mean 'float32'?"),
    "dtype of no network": (["--dtype", "int8"], "argument --dtype: 'int8' is not one of float32, bfloat16, float16"),
    "device": (["--device", "abacus"], "--device abacus is not available here: use --device cpu"),
    "device without values": (["--device", "meta"], "--device meta is not cpu or cuda"),
    "option": (["--metod", "direct"], "--metod is no option: did you mean '--method'? (see --help; a prompt"),
    "option like none": (["--colour", "red"], "--colour is no option"),
    "hub id": (["--model", "someone/nothing"], "someone/nothing is no file or folder, and no model in the local"),
    **{
        f"path: {path}": (
            ["--model", path],
            f"{path or repr(path)} does not exist: pass a diffusers folder or a .safete",
        )
        for path in ("", "models/sdxl.safetensors", "/nope.safetensors", "/sdxl", "../x", "./x")
    },
    "model of two lines": (["--model", "a\nb"], "a b does not exist: pass a diffusers folder or a .safetensors file"),
    "configuration of a folder": (["--config", "nowhere"], "--config 'nowhere' is for single files"),
    "LoRA": (["--lora", "x" * 900], f"argument --lora: {'x' * 900} is no file or folder: give PATH or PATH:SCALE"),
    "a long LoRA": (["--lora", "x" * 5000], f"argument --lora: {'x' * 483} … xxx"),
}
REFUSED = {
    f"{section}: {name}": row
    for section, rows in {"prompt": REFUSED_PROMPTS, "sampling": SAMPLING, "unknown name": NAMES}.items()
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("empty_cache")
def test_refused(name: str, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = REFUSED[name]
    line = command_line.refuses(arguments, 2, expected)
    assert line.startswith(expected) or expected.startswith("did you mean")


@pytest.mark.skipif(sys.platform == "darwin", reason="its arguments are UTF-8")
@pytest.mark.parametrize("name", ["prompt: lone surrogate", "sampling: guidance NaN", "unknown name: method"])
def test_refused_as_a_user_types_it(name: str, command_line: CommandLine) -> None:
    arguments, expected = REFUSED[name]
    command_line.refuses(arguments, 2, expected, apart=True)


def test_below_native_is_drawn(tmp_path: Path) -> None:
    assert main(["--width", "8", "--height", "72", "--steps", "1", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "cutdiffusion-8x72-seed0.png") as image:
        assert image.size == (8, 72)


DEMOFUSION = b'{"prompt": "a", "method": "demofusion", "cosine_scales": '
LINES: dict[bytes, str] = {
    b"{": "a line that begins with { must be a JSON object (Expecting",
    b"{red|blue} house": "a line that begins with { must be a JSON object (Expecting",
    b'{"prompt": "a"} b': "a line that begins with { must be a JSON object (Extra data",
    b'{"a":' + b"[" * 100_000: "a line that begins with { must be a JSON object (",
    b'{"width": 256}': 'an object needs "prompt", a text',
    b'{"prompt": 5}': 'an object needs "prompt", a text',
    b'{"prompt": "a", "widht": 256}': f"--widht 256 {OF_DIRECT}: did you mean 'width'?",
    b'{"prompt": "a", "guidance": 3}': "--guidance 3 must be a function of (conditional, unconditional, sigma, step), ",
    b'{"prompt": "a", "guidance_scal": 3}': f"--guidance-scal 3 {OF_DIRECT}: did you mean 'guidance_scale'?",
    b'{"prompt": "a", "zzz": 3}': f"--zzz 3 {OF_DIRECT}",
    b'{"prompt": "a", "out": "elsewhere"}': "out is for all lines: give --out on the command line",
    b'{"prompt": "a", "images": "folder"}': "images is for all lines: give --images on the command line",
    b"a tent --lora tents": "lora is for all lines: give --lora on the command line",
    b'{"prompt": "a", "image": ["a.png"]}': "--image ['",
    b'{"prompt": "a", "control": ["x", 3], "control_image": "y"}': "--control 3 must be a file or a folder of a Contr",
    b'{"prompt": "a", "regions": ["a tent"]}': "--regions region 1: 'a tent' is no object: write one such as in",
    b'{"prompt": "a", "regions": {"prompt": "x"}}': "--regions {'prompt': 'x'} must be a list of regions, such as",
    b'{"prompt": "a", "regions": [{"prompt": "x", "prompt": "y"}]}': "a line that begins with { must be a JSON object "
    "('prompt' is given twice in one object)",
    b'{"prompt": "a", "fit": "cover"}': "--fit 'cover' goes with --image: give that, or leave it out",
    b'{"prompt": "a", "steps": 3, "num_steps": 3}': "num_steps is given twice",
    b'{"prompt": "a", "width": "many"}': "--width 'many' must be a whole number",
    b'{"prompt": "a", "width": 256.5}': "--width 256.5 must be a whole number",
    b'{"prompt": "a", "seed": null}': "--seed None must be a whole number",
    b'{"prompt": "a", "stride": 8}': f"--stride 8 {OF_DIRECT}, but of {WITH_VIEWS}",
    b'{"prompt": "a", "width": {"side": 256}}': "width must be a text, a number or a list, not an object",
    b'{"prompt": "a", "width": true}': "--width True must be a whole number",
    b'{"prompt": "a", "width": [256]}': "--width [256] must be a whole number",
    DEMOFUSION + b"3}": "--cosine-scales 3 must be 3 values, each a finite number at least 0",
    DEMOFUSION + b'[1, "--help", 3]}': "--cosine-scales [1, '--help', 3] must be 3 values, each a finite number",
    DEMOFUSION + b"[1, 2]}": "--cosine-scales [1, 2] must be 3 values, each a finite number at least 0",
    b'{"prompt": "a", "width": 100}': "--width 100 must be a multiple of 8",
    b'{"prompt": "a", "steps": 0}': "--steps 0 must be a whole number at least 1",
    b'{"prompt": "a", "guidance_scale": NaN}': "--guidance-scale nan must be a finite number",
    b'{"prompt": "a", "method": "magic"}': "--method 'magic' is not one of direct, ",
    b'{"prompt": "a", "clip_skip": 9}': "--clip-skip 9 must lie in 1 … 3",
    b'{"prompt": "\\ud800"}': r"the prompt '\ud800' is not valid UTF-8",
    b'{"prompt": "a", "negative_prompt": "\\u0000"}': r"the prompt '\x00' holds a NUL",
    b"a \xff house": "byte 3 is not UTF-8",
    b"--help": '--help has no value; a prompt that holds it is written as {"prompt":',
    b"a tent --ar 16:9": f"--ar '16:9' {OF_DIRECT}",
    b"a tent --width many": "--width 'many' must be a whole number",
    b"a tent --width 100": "--width 100 must be a multiple of 8",
    b"a tent --width 128 136": "--width 128, 136 must be a whole number",
    b"a tent --steps 3 --num-steps 3": "num-steps is given twice",
    b"a tent --prompt b": "prompt is given twice",
    b"--width 128": "a line of options needs a prompt: begin with it, or give",
    b'--prompt "a tent --width 128': "its options cannot be read (No closing quotation): close quotes",
    b"a tent --batch_size 4": "--batch_size is an option of A1111's that is not built here: leave it out",
    b"a tent --cfg_scale high": "--guidance-scale 'high' must be a finite number",
    b"a tent --sampler_name Eulre": "--sampler_name 'Eulre' is not one of Euler, ",
    b"a tent --stride 8": f"--stride '8' {OF_DIRECT}, but of {WITH_VIEWS}",
    b"<lora:tents:0.3> a tent": "the prompt names the LoRA 'tents': give --lora-dir DIR, a folder that holds ",
    b"<lora:tents:many> a tent": "<lora:tents:many> must be <lora:NAME:SCALE>, with one scale",
    b"<lora:tents:1:0.5> a tent": "<lora:tents:1:0.5> must be <lora:NAME:SCALE>, with one scale",
    b"<lora::1> a tent": "<lora::1> must be <lora:NAME:SCALE>, with one scale",
    b"<hypernet:tents:1> a tent": "<hypernet:tents:1> is a hypernetwork, which cannot be read: leave it out",
    b'{"prompt": "a", "negative_prompt": "<lora:tents>"}': "--negative-prompt names a LoRA, which only the prompt may",
}
"""Lines of a file of prompts, and the messages about them."""
LATE = ("multiple of 8", "clip-skip")
"""Words of messages that can come only once the model is known."""


@pytest.mark.parametrize("line", LINES)
def test_line_of_a_file_of_prompts(line: bytes, tmp_path: Path, command_line: CommandLine) -> None:
    """The message names the line; where no line is good, nothing is drawn."""
    file = tmp_path / "prompts.txt"
    last = b"" if any(words in LINES[line] for words in LATE) else b"\n{"
    file.write_bytes(b"\n# a tent\n" + line + last)
    said = command_line.refuses(["--prompts", file, *QUICK], 2)
    assert said.startswith(f"{file}, line 3: {LINES[line]}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[\n  {"prompt": "a tent"}\n]\n', "one JSON value, where each prompt's object has a line of its own"),
        (b'["a tent", "a house"]', "one JSON value"),
        (b'{\n  "prompt": "a tent"\n}', "one JSON value"),
        (b"<!DOCTYPE html>\n<html><body>a tent</body></html>", "a web page or XML"),
    ],
)
def test_another_format_for_a_file_of_prompts(
    content: bytes, what: str, tmp_path: Path, command_line: CommandLine
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    command_line.refuses(
        ["--prompts", file], 1, f"--prompts {file} cannot be read (it is {what}", "): give a text file"
    )


@pytest.mark.parametrize("content", [b"", b"\n \n# nothing\n"])
def test_file_without_prompts(content: bytes, tmp_path: Path, command_line: CommandLine) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    command_line.refuses(["--prompts", file], 1, f"--prompts {file} holds no prompt: give at least one line")
