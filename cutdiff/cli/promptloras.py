"""The LoRAs that prompts name, as `<lora:name:0.3>`, found in the folder of --lora-dir."""

from __future__ import annotations

import argparse
from pathlib import Path

from cutdiff.cli.arguments import BadArgument
from cutdiff.cli.runs import BadLine, Request
from cutdiff.models.prompts import named_loras
from cutdiff.options import nearest

Named = list[tuple[str, float]]
"""Files or names of LoRAs and their scales."""
ENDING = ".safetensors"


def take_loras(args: argparse.Namespace, requests: list[Request]) -> tuple[list[Request], list[BadLine]]:
    """The requests without the LoRAs that their prompts name, which join `loras` of the arguments, and the lines whose
    LoRAs cannot be had. A run has one model, so that all lines must name the same as the first. BadArgument where there
    is no file of lines."""
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise BadArgument(f"--lora-dir {args.lora_dir} is no folder: give one that holds LoRAs")
    taken: list[Request] = []
    bad: list[BadLine] = []
    first: Named = []
    for request in requests:
        try:
            prompt, files = _named(request, args.lora_dir)
            if taken and files != first:
                raise BadArgument(
                    f"the prompt names other LoRAs than line {taken[0].line}, and a run has one model: draw it in "
                    "another run"
                )
        except BadArgument as error:
            if not request.line:
                raise
            bad.append(BadLine(args, request.line, error))
            continue
        first = files
        taken.append(request._replace(prompt=prompt))
    args.loras = [*args.loras, *first]
    return taken, bad


def _named(request: Request, folder: Path | None) -> tuple[str, Named]:
    """The prompt of a request without its LoRAs, and these as files."""
    try:
        for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
            if named_loras(getattr(request.settings, name) or "")[1]:
                raise ValueError(f"--{name.replace('_', '-')} names a LoRA, which only the prompt may")
        prompt, named = named_loras(request.prompt)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    return prompt, [(str(_file(name, scale, folder)), scale) for name, scale in named]


def _file(name: str, scale: float, folder: Path | None) -> Path:
    """The file of a LoRA in the folder or in one inside of it."""
    if folder is None:
        raise BadArgument(
            f"the prompt names the LoRA {name!r}: give --lora-dir DIR, a folder that holds {name}{ENDING}, or leave it "
            f"out of the prompt and give --lora FILE:{scale:g}"
        )
    files = [path for path in sorted(folder.rglob(f"*{ENDING}")) if path.is_file()]
    same = [path for path in files if path.stem == name]
    if not same:
        near = nearest(name, [path.stem for path in files])
        raise BadArgument(f"the prompt names the LoRA {name!r}, and {folder} holds no {name}{ENDING}{near}")
    if len(same) > 1:
        paths = " and ".join(map(str, same))
        raise BadArgument(f"the prompt names the LoRA {name!r}, which {paths} are: give one as --lora FILE:{scale:g}")
    return same[0]
