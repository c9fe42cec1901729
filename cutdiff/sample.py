"""The command line: `python -m cutdiff.sample "a red house at night"`.

No module below it prints or exits. Exit status: 0, 1 for a run that failed or a file that is no good, 2 for
arguments that cannot be used, 143 for one that was terminated. torch is imported after the arguments are parsed, so
that --help answers at once. Of several processes one says what concerns all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cutdiff.cli.arguments import BadArgument, as_taken, of_flag, parse
from cutdiff.cli.drawing import Trace, draw_all, leave_out, tell
from cutdiff.cli.ending import Failure, exit_status
from cutdiff.cli.output import check_output
from cutdiff.cli.promptloras import take_loras
from cutdiff.cli.runs import BadLine, Picture, Request, check_fit, plan_pictures, read_requests, take_preferred
from cutdiff.parallel import stopping
from cutdiff.parallel.process import alike, num_processes, process

if TYPE_CHECKING:
    from cutdiff.checkpoint.model import Model

OPTIONS = (
    "config=",
    "vae=",
    "variant=",
    "prediction_type=",
    "zero_terminal_snr=",
    "timestep_spacing=",
    "fp8=",
    "text_encoder_3=",
)
"""The beginnings of errors of `load` that are about a flag."""
LISTED = 5
"""The lines of a file of prompts, or pictures, that the last message names before it only counts them."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv)


def _run(argv: list[str] | None) -> None:
    with alike():
        args = parse(argv)
        _check_processes(args)
    from cutdiff.cli.device import tell_dtype
    from cutdiff.parallel.launch import joined

    with joined(args.device, args.data_parallel, args.rank_timeout) as launch:
        with launch.agreeing():
            requests, bad = read_requests(args)
            requests, unnamed = take_loras(args, requests)
            bad = sorted([*bad, *unnamed], key=lambda error: error.line)
            _leave_out(args, bad, everything=not requests)
            if launch.group.leads:
                check_output("--out", args.out)
            model = _load(args)
            tell_dtype(args.dtype, model.device, model.dtype)
            _tell_model(model, everything=args.verbose)
            _tell_notices(requests)
            requests, taken = take_preferred(model, args, requests)
            requests, unfit = check_fit(model, args, requests)
            _leave_out(args, unfit, everything=not requests)
            pictures = plan_pictures(model, args, requests)
            if args.trace:
                from cutdiff.trace import is_page_of

                how = _how(args)
                pictures = [replace(each, finished=each.finished and is_page_of(each.path, **how)) for each in pictures]
            if taken and process() == 0:
                tell(as_taken(taken))
            if launch.group.leads:
                from cutdiff.output.images import remove_parts

                try:
                    remove_parts(args.out, {picture.path.stem for picture in pictures})
                except OSError as error:
                    where = f"{error.filename} stands where a picture is written ({error.strerror})"
                    raise BadArgument(f"--out {args.out}: {where}: remove it, or choose another --out") from None
        failed, blank = draw_all(model, args, pictures, launch, partial(_followed, model, args))
    with alike():
        lines = sorted({*(error.line for error in (*bad, *unfit)), *failed})
        ends = [_left_out(args, lines)] * bool(lines)
        if blank:
            ends.append(f"one value throughout: {_listed(blank)}; --check-weights would find zeros in the weights")
        if ends:
            raise Failure("; ".join(ends))


def _left_out(args: argparse.Namespace, lines: list[int]) -> str:
    """The last message on lines, or given pictures, that were not drawn."""
    if args.images is None:
        return f"{args.prompts}, left out: {_listed(lines)}; correct these lines and start again"
    names = [args.files[line - 1].name for line in lines]
    return f"{args.images}, left out: {_listed(names)}; replace these pictures and start again"


def _listed(things: Sequence[object]) -> str:
    """The first few things, and how many more there are."""
    more = f" and {len(things) - LISTED} more" if len(things) > LISTED else ""
    return f"{', '.join(map(str, things[:LISTED]))}{more}"


@contextmanager
def _followed(model: Model, args: argparse.Namespace, picture: Picture) -> Iterator[Trace | None]:
    """The trace of a picture, or None without --trace; where it does not come to its end, tell where it is."""
    if not args.trace:
        yield None
        return
    from cutdiff.trace import Unwritable, tracing

    page, trace = picture.path.with_suffix(".html"), None
    try:
        with tracing(model, picture.prompt, picture.settings, page, **_how(args)) as trace:
            yield trace
    except Unwritable as error:
        raise Failure(str(error)) from None
    except BaseException:
        if trace is not None and trace.path.exists():
            tell(f"the trace of {picture.path.name} up to there is {trace.path}")
        raise


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a trace."""
    return {"every": args.trace_every, "decode": args.trace_decode, "data": args.trace_data}


def _check_processes(args: argparse.Namespace) -> None:
    num_groups = args.data_parallel
    if num_groups < 1 or num_processes() % num_groups:
        raise BadArgument(
            f"--data-parallel {num_groups} does not divide the {num_processes()} processes of this run: "
            "start a multiple of it with torchrun --nproc-per-node"
        )
    if args.trace and num_processes() > num_groups:
        raise BadArgument(
            f"--trace listens to one process, and {num_processes() // num_groups} share the work of a picture: "
            f"give --data-parallel {num_processes()}, or leave it out"
        )


def _leave_out(args: argparse.Namespace, bad: list[BadLine], *, everything: bool) -> None:
    """Tell of lines that cannot be drawn; where there are no others, the first ends the run."""
    if everything:
        raise bad[0]
    for error in bad:
        if process() == 0:
            leave_out(args, error)


def _tell_notices(requests: list[Request]) -> None:
    """Tell, each once, how given pictures and regions were read where that may not be what was meant."""
    for notice in dict.fromkeys(notice for request in requests for notice in request.settings.notices()):
        if process() == 0:
            tell(str(of_flag(ValueError(notice))))


def _load(args: argparse.Namespace) -> Model:
    import torch

    import cutdiff
    from cutdiff.checkpoint import EmbeddingError, LoraError
    from cutdiff.cli.device import device_of, dtype_of

    device = device_of(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on which Triton's kernels run
    if args.offload and device.type == "cpu":
        raise BadArgument("--offload moves the text encoders to the CPU, where this run is: leave it out")
    try:
        model = cutdiff.load(
            args.model,
            device=device,
            dtype=dtype_of(args.dtype, device),
            config=args.config,
            vae=args.vae,
            variant=args.variant,
            prediction_type=args.prediction_type,
            zero_terminal_snr=args.zero_terminal_snr,
            timestep_spacing=args.timestep_spacing,
            loras=args.loras,
            embeddings=args.embeddings,
            check_weights=args.check_weights,
            fp8=args.fp8,
            text_encoder_3=args.text_encoder_3,
        )
    except LoraError as error:
        raise Failure(f"--lora {error}") from None
    except EmbeddingError as error:
        raise Failure(f"--embedding {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith(OPTIONS):
            raise of_flag(error) from None
        raise (BadArgument if isinstance(error, FileNotFoundError) else Failure)(str(error)) from None
    return replace(model, text=model.text.offloaded()) if args.offload else model


def _tell_model(model: Model, *, everything: bool) -> None:
    """Tell which model was read, and who decided what it predicts; without `everything` only what may be wrong."""
    if process() > 0:
        return
    if everything:
        tell(f"{model.source}, native size {model.native_size * model.factor} px")
        for name, path in model.files.items():
            tell(f"weights {name} from {path}")
        for lora in model.loras:
            tell(f"LoRA {lora.path} times {lora.scale}")
        for embedding in model.embeddings:
            tell(f"{embedding.token} stands for the vectors of {embedding.path}")
    values = model.noise.described()
    for name, source in model.decided_by.items():
        if everything or source.startswith("default,"):
            tell(f"{name}={values[name]}, decided by: {source}")


if __name__ == "__main__":
    stopping.install()
    sys.exit(main())
