"""Bad input: every way in which a LoRA's file can be wrong. The command line says which in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loras import CONVOLUTION, CROSS, FEED, Tensors, good, whole_lora
from refusal import CommandLine
from safetensors.torch import save_file
from tiny import Tiny

from cutdiff.checkpoint import LoraError, load
from cutdiff.checkpoint.lora.metadata import KEY
from cutdiff.checkpoint.lora.names import flat

LAYER, FILTER = (f"lora_unet_{flat(module)}" for module in (FEED, CONVOLUTION))
DOWN, UP, ALPHA = (f"{LAYER}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
"""Keys of a matrix (512, 64)."""


def put(**sizes: tuple[int, ...]) -> Callable[[Tensors], None]:
    """Put other factors of those shapes in the place of the layer's LoRA."""

    def edit(tensors: Tensors) -> None:
        for key in (DOWN, UP):
            del tensors[key]
        tensors.update({f"{LAYER}.{name}": torch.ones(size) for name, size in sizes.items()})

    return edit


def fill(key: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: torch.full_like(tensors[key], value)})


def rename(*renamed: tuple[str, str]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for key in [*tensors]:
            new = key
            for old, other in renamed:
                new = new.replace(old, other)
            tensors[new] = tensors.pop(key)

    return edit


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "no up": (
        lambda tensors: tensors.pop(UP),
        ["1 incomplete changes", f"{LAYER} has alpha and lora_down where lora_down and lora_up belong"],
    ),
    "no down": (lambda tensors: tensors.pop(DOWN), ["has alpha and lora_up where lora_down and lora_up belong"]),
    "nothing but alpha": (put(), ["has alpha where lora_down and lora_up belong"]),
    "half a Hadamard product": (
        put(hada_w1_a=(512, 2), hada_w1_b=(2, 64)),
        ["has alpha and hada_w1_a and hada_w1_b where hada_w1_a and hada_w1_b and hada_w2_a and hada_w2_b belong"],
    ),
    "one core of two": (
        put(hada_w1_a=(2, 512), hada_w1_b=(2, 64), hada_w2_a=(2, 512), hada_w2_b=(2, 64), hada_t1=(2, 2, 1, 1)),
        ["has alpha and hada_t1 and hada_w1_a", "where hada_w1_a"],
    ),
    "half a Kronecker factor": (
        put(lokr_w1=(2, 2), lokr_w2_a=(256, 2)),
        ["where lokr_w1 and lokr_w2_a and lokr_w2_b belong"],
    ),
    "two kinds": (lambda tensors: tensors.update({f"{LAYER}.diff": torch.ones(512, 64)}), ["incomplete", "diff"]),
    "corrupt LoRA alpha: NaN": (
        fill(ALPHA, NAN),
        ["1 alphas that are no finite number", f"{ALPHA} is nan, torch.float32"],
    ),
    "corrupt LoRA alpha: infinite": (fill(ALPHA, -INF), [f"{ALPHA} is -inf"]),
    "corrupt LoRA alpha: a list": (
        lambda tensors: tensors.update({ALPHA: torch.ones(2)}),
        [f"{ALPHA} is of shape (2,)"],
    ),
    "corrupt LoRA alpha: of no dtype of numbers": (
        lambda tensors: tensors.update({ALPHA: torch.tensor(True)}),
        [f"{ALPHA} is True, torch.bool"],
    ),
    "factor NaN": (fill(UP, NAN), ["1 factors that are not finite", UP]),
    "factor infinite": (fill(DOWN, INF), ["1 factors that are not finite", DOWN]),
    "quantized": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}),
        ["1 quantized factors", f"{DOWN} torch.int8"],
    ),
    "ranks that do not fit": (
        lambda tensors: tensors.update({UP: torch.ones(512, 9)}),
        ["1 changes of another shape", f"{LAYER} has", "lora_up (512, 9)", "where (512, 64) is to be changed"],
    ),
    "a layer of another size": (
        lambda tensors: tensors.update({UP: torch.ones(256, len(tensors[DOWN]))}),
        ["lora_up (256, ", "(512, 64)"],
    ),
    "a kernel of another size": (
        lambda tensors: tensors.update({f"{FILTER}.lora_down.weight": torch.ones(3, 128, 1, 1)}),
        ["(3, 128, 1, 1)", "where (64, 128, 3, 3) is to be changed"],
    ),
    "a vector": (lambda tensors: tensors.update({DOWN: torch.ones(64)}), ["lora_down (64,)", "(512, 64)"]),
    "a number": (lambda tensors: tensors.update({UP: torch.ones(())}), ["lora_up ()", "(512, 64)"]),
    "sizes that would broadcast": (
        put(hada_w1_a=(512, 2), hada_w1_b=(2, 64), hada_w2_a=(1, 2), hada_w2_b=(2, 64)),
        ["hada_w2_a (1, 2)", "(512, 64)"],
    ),
    "ranks that would broadcast": (
        put(
            hada_w1_a=(1, 512),
            hada_w1_b=(2, 64),
            hada_w2_a=(2, 512),
            hada_w2_b=(2, 64),
            hada_t1=(2, 2, 1, 1),
            hada_t2=(2, 2, 1, 1),
        ),
        ["hada_w1_a (1, 512)", "(512, 64)"],
    ),
    "two ranks": (
        put(lokr_w1_a=(2, 3), lokr_w1_b=(3, 2), lokr_w2_a=(256, 4), lokr_w2_b=(4, 32)),
        ["1 changes without one rank", f"{LAYER} has 3 and 4"],
    ),
    "rank 0": (
        lambda tensors: tensors.update({UP: torch.ones(512, 0), DOWN: torch.ones(0, 64)}),
        ["1 changes without one rank", f"{LAYER} has 0"],
    ),
    "another model": (
        rename(("lora_unet_", "transformer."), ("lora_te1_", "encoder.")),
        ["is no LoRA for this model", "It has encoder.text_model_", "expected were such as lora_unet_", "or unet."],
    ),
    "nothing": (lambda tensors: tensors.clear(), ["is no LoRA for this model", "It has none"]),
    "SD 1.5 LoRA on SDXL": (
        lambda tensors: tensors.update({f"lora_unet_{flat(CROSS)}.lora_down.weight": torch.ones(2, 768)}),
        ["reads text of width 768 (Stable Diffusion 1)", "this model's reads width 192: use a LoRA of"],
    ),
    "a few modules of another model": (
        lambda tensors: tensors.update({f"lora_unet_odd_{i:02}.lora_up.weight": torch.ones(1, 1) for i in range(12)}),
        ["12 keys of no module of this model: lora_unet_odd_00.lora_up.weight", "_09.lora_up.weight and 2 more"],
    ),
    "a bias of a module without one": (
        lambda tensors: tensors.update({f"lora_unet_{flat(CROSS)}.diff_b": torch.ones(64)}),
        [f"1 biases of modules that have none: lora_unet_{flat(CROSS)}.diff_b"],
    ),
    "magnitudes of another size": (
        lambda tensors: tensors.update({f"{LAYER}.dora_scale": torch.ones(256, 1)}),
        [f"1 magnitudes of another shape: {LAYER}.dora_scale (256, 1) beside (512, 64)"],
    ),
    "magnitudes alone": (
        lambda tensors: tensors.update({f"{LAYER}.dora_scale": tensors.pop(UP)[:, :1]}),
        ["1 incomplete changes", "has alpha and magnitude and lora_down where lora_down and lora_up belong"],
    ),
    "magnitudes NaN": (
        lambda tensors: tensors.update({f"{LAYER}.dora_scale": torch.full((512, 1), NAN)}),
        ["1 factors that are not finite", f"{LAYER}.dora_scale"],
    ),
    "nothing but textual inversions": (
        lambda tensors: (tensors.clear(), tensors.update({"bundle_emb.cat.clip_l": torch.ones(1, 64)})),
        ["is no LoRA: it holds nothing but the textual inversions cat"],
    ),
    "the same under two names": (
        lambda tensors: tensors.update({f"unet.{FEED}.lora_A.weight": tensors[DOWN]}),
        ["1 keys that repeat another", "lora"],
    ),
    "all that is wrong": (
        lambda tensors: tensors.update({key: torch.ones(2) for key in (ALPHA, "odd", f"{LAYER}.scalar")}),
        ["1 keys of what is not supported", "; 1 keys of no module", "; 1 alphas"],
    ),
    **{
        f"not supported: {part}": (
            lambda tensors, part=part: tensors.update({f"{LAYER}.{part}": torch.ones(2, 2)}),
            ["1 keys of what is not supported", f"{LAYER}.{part} ({kind})"],
        )
        for part, kind in {
            "q_layer.weight": "T-LoRA, whose change depends on the timestep",
            "lambda_layer": "T-LoRA, whose change depends on the timestep",
            "scalar": "a factor that LyCORIS multiplies into the others when it saves a finished file",
            "oft_blocks": "OFT",
            "oft_diag": "OFT",
            "a1.weight": "GLoRA",
            "on_input": "IA3",
            "lora_B.bias": "a bias",
        }.items()
    },
}
"""Functions that make a good file a bad one, and the messages."""


@pytest.mark.parametrize("name", WRONG)
def test_file(name: str, tiny: Tiny, folder: Path, tmp_path: Path, command_line: CommandLine) -> None:
    edit, expected = WRONG[name]
    tensors, file = good(tiny), tmp_path / "lora.safetensors"
    edit(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)
    line = command_line.refuses(["--model", folder, "--lora", f"{file}:0.5"], 1, *expected)
    assert line.startswith(f"--lora {file} ")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("[" * 10_000, "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"unet.lora_alpha": NaN}', "has unet.lora_alpha=nan: nan is no finite number"),
        ('{"unet.lora_alpha": "4"}', "'4' is no finite number"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "is no finite number"),
        ('{"unet.alpha_pattern": {"to_k": null}}', "None is no finite number"),
        ('{"unet.alpha_pattern": {"attn(.*to_k": 4}}', "'attn(.*to_k', which is no regular expression (missing )"),
        ('{"unet.alpha_pattern": {"(?!attn1).*": 4}}', "'(?!attn1).*', an expression with assert_not: write"),
        ('{"unet.alpha_pattern": {"((((a+)+)+)+)": 4}}', "with more than 3 repetitions inside one another: write"),
        ('{"unet.alpha_pattern": [4]}', "unet.alpha_pattern=[4] is no object of numbers by the names of modules"),
    ],
)
def test_metadata(
    metadata: str, expected: str, tiny: Tiny, folder: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(good(tiny), file, metadata={KEY: metadata})
    command_line.refuses(["--model", folder, "--lora", file], 1, f"--lora {file}: its metadata {KEY}", expected)


CONFIGS: dict[str, tuple[dict[str, object] | None, str]] = {
    "none": (None, "was written by PEFT, which keeps alpha in adapter_config.json, and {beside} does not exist: put"),
    "without alpha": ({"r": 4}, "{beside} has no lora_alpha and no alpha, so no strength: take the adapter's own"),
    "alpha NaN": ({"lora_alpha": NAN}, "{beside} has lora_alpha=nan: nan is no finite number"),
    **{
        f"of kind {kind}": (
            {"peft_type": kind, "r": 2},
            f"{{beside}} has peft_type={kind!r}, which is not supported, only LORA, LOHA, LOKR: let PEFT merge it into",
        )
        for kind in ("OFT", "IA3", "VERA", "ADALORA")
    },
    "rank 0": ({"alpha": 8, "r": 0, "peft_type": "LOKR"}, "{beside} has r=0: a rank is at least 1"),
    "ranks by something else": (
        {"alpha": 8, "r": 2, "peft_type": "LOKR", "rank_pattern": {"conv[": 4}},
        "{beside} has rank_pattern: 'conv[', which is no regular expression",
    ),
    **{
        f"base of {name}": (
            {"lora_alpha": 8, "init_lora_weights": name},
            f"{{beside}} has init_lora_weights={name!r}, so it changes other weights than the model's: let PEFT",
        )
        for name in ("pissa", "pissa_niter_4", "olora", "CorDA", "loftq", "lora_ga")
    },
    **{
        name: ({"lora_alpha": 8, name: value}, f"{{beside}} has {name}={value!r}, which is not supported: merge")
        for name, value in {"layer_replication": [[0, 2]], "use_qalora": True, "use_bdlora": [1]}.items()
    },
}
"""Files beside one that PEFT wrote, and the messages about them."""


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_config(name: str, folder: Path, tmp_path: Path, command_line: CommandLine) -> None:
    config, expected = CONFIGS[name]
    file, beside = tmp_path / "style.safetensors", tmp_path / "adapter_config.json"
    save_file({f"base_model.model.{FEED}.lora_A.weight": torch.ones(2, 64)}, file)
    if config is not None:
        beside.write_text(json.dumps(config))
    command_line.refuses(["--model", folder, "--lora", file], 1, expected.format(beside=beside))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("style.safetensors:nan", "has the scale 'nan': it must be a finite number"),
        ("style.safetensors:inf", "has the scale 'inf'"),
        ("style.safetensors:1e999", "has the scale '1e999'"),
        ("style.safetensors:1e39", "has the scale '1e39'"),
        ("style.safetensors:strong", "has the scale 'strong'"),
        ("style.safetensors:", "has the scale ''"),
        ("gone.safetensors", "is no file or folder: give PATH or PATH:SCALE"),
        ("gone.safetensors:0.5", "is no file or folder: give PATH or PATH:SCALE"),
    ],
)
def test_argument(name: str, expected: str, tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"")
    path = tmp_path / name
    command_line.refuses(["--lora", path], 2, f"argument --lora: {path} {expected}")


FOLDERS: dict[str, tuple[list[str], str]] = {
    "empty": ([], "pass the folder of an adapter, or a file"),
    "files of other names": (["b.safetensors", "a.safetensors"], "name one of its files, a.safetensors, b.safetensors"),
    "an adapter in a folder": (["unet/adapter_model.safetensors"], "name one of its files, unet/adapter_model.safeten"),
    "pickled": (["adapter_model.bin"], "it has pickled files, which could run code as they are opened: convert them"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str, tmp_path: Path, command_line: CommandLine) -> None:
    files, expected = FOLDERS[name]
    (tmp_path / "style").mkdir()
    for file in files:
        (tmp_path / "style" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "style" / file).write_bytes(b"")
    path = tmp_path / "style"
    line = command_line.refuses(["--lora", f"{path}:0.5"], 1, expected)
    assert line.startswith(f"--lora {path} is a folder without adapter_model.safetensors or pytorch_lora_weights.")


@pytest.mark.parametrize("ending", ["", ":2"])
def test_a_file_whose_name_ends_like_a_scale(ending: str, tmp_path: Path, command_line: CommandLine) -> None:
    file = tmp_path / "style:0.5"
    file.write_bytes(b"")
    command_line.refuses(["--lora", f"{file}{ending}"], 1, f"--lora {file} is empty")


def test_nothing_is_merged_before_all_is_checked(
    tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = whole_lora(tiny, original=False)
    save_file(tensors, files[0])
    tensors.popitem()
    tensors.popitem()
    save_file(tensors, files[1])
    monkeypatch.setattr("cutdiff.checkpoint.lora.file.Change.of", None)
    with pytest.raises(LoraError, match=r"two\.safetensors cannot be merged"):
        load(folder, loras=[(file, 1) for file in files])
