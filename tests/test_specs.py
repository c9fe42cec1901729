"""Specs and options: every object by its name, every option by its type, and an error that says what there is."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from own import METHODS, OwnModules
from refusal import CommandLine

from cutdiff import specs
from cutdiff.cli.arguments import BadArgument, parse
from cutdiff.cli.runs import read_requests
from cutdiff.evaluate import main as evaluate
from cutdiff.methods.cutdiffusion import CutDiffusion
from cutdiff.methods.direct import direct
from cutdiff.methods.magnify import Magnify
from cutdiff.methods.upscale import Upscaler
from cutdiff.options import MAX_FLOAT32, _docs, checked, options_of, read, short
from cutdiff.sampling.schedules import Listed
from cutdiff.sampling.solvers import DDIM
from cutdiff.sampling.split import Split
from cutdiff.settings import LATER, Settings

SHIPPED = [(kind, name) for kind, table in specs.NAMED.items() for name in table]
QUICK = ["--steps", "1", "--width", "128", "--height", "128"]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type of an option."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = {"min_value": args[1].low, "max_value": min(args[1].high, MAX_FLOAT32)}
        if args[0] is int:
            return st.integers(int(bounds["min_value"]), int(min(bounds["max_value"], 10**6)))
        return st.floats(**bounds, allow_nan=False)
    if Upscaler in args:
        return st.sampled_from([*specs.UPSCALERS, *map(partial(specs.resolve, "upscaler"), specs.UPSCALERS)])
    if Split in args:
        splits = [*specs.SPLITS, "gaussian,sigma=3", "down_up,size=(3,4)", "wavelet,name=db4"]
        nothing = [None] if type(None) in args else []
        return st.sampled_from([*splits, *map(partial(specs.resolve, "split"), splits), *nothing])
    if origin is Union or type(kind).__name__ == "UnionType":
        return st.one_of(*map(values_of, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), min_size=2, max_size=5).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    return {
        float: st.floats(-MAX_FLOAT32, MAX_FLOAT32),
        int: st.integers(),
        str: st.text(st.characters(exclude_categories=["Cs"])),
        bool: st.booleans(),
        type(None): st.none(),
    }[kind]


# ---- Specs


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
@given(data=st.data())
def test_a_full_spec_is_the_object(kind: str, name: str, data: st.DataObject) -> None:
    thing = specs.resolve(kind, name) if name != "list" else Listed((1.0, 0.0))
    drawn = {option.name: data.draw(values_of(option.type)) for option in options_of(thing).values()}
    try:
        thing = replace(thing, **drawn) if drawn else thing
    except ValueError as error:
        assume(not str(error).endswith("leave one out"))
        raise
    spec = specs.spec_of(kind, thing)
    assert spec.startswith(name)
    assert specs.resolve(kind, spec) == thing
    assert specs.spec_of(kind, specs.resolve(kind, spec)) == spec
    assert specs.resolve(kind, thing) == thing


def test_a_full_spec_is_an_object_of_ones_own_with_any_text(own: OwnModules) -> None:
    own.write("mine_methods", METHODS)
    cls = type(specs.resolve("method", "mine_methods:Mine"))

    @given(drawn=st.fixed_dictionaries({name: values_of(option.type) for name, option in options_of(cls).items()}))
    def check(drawn: dict[str, Any]) -> None:
        thing = cls(**drawn | {"strength": 2.0})
        spec = specs.spec_of("method", thing)
        assert spec.startswith("Mine,")
        assert specs.resolve("method", f"mine_methods:{spec}") == thing

    check()


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("magnify", {}),
        ("magnify,stride=4", {"stride": "4"}),
        (" magnify , stride = 4 ", {"stride": "4"}),
        ("demofusion,cosine_scales=(3,1,1),stride=4", {"cosine_scales": "(3,1,1)", "stride": "4"}),
        ("demofusion,cosine_scales=[3, 1, 1]", {"cosine_scales": "[3, 1, 1]"}),
        ("m:M,a={1:(2,3)},b=4", {"a": "{1:(2,3)}", "b": "4"}),
        ("m:M,a='x, y=(',b=4", {"a": "x, y=(", "b": "4"}),
        ("m:M,a=it's,b=4", {"a": "it's", "b": "4"}),
        ('m:M,a="say \\"no, no\\"",b=4', {"a": 'say "no, no"', "b": "4"}),
        ("m:M,a==,b=", {"a": "=", "b": ""}),
    ],
)
def test_a_spec_is_split_at_commas_outside_of_brackets_and_quotes(spec: str, options: dict[str, str]) -> None:
    assert specs.parse("method", spec) == (spec.partition(",")[0].strip(), options)


@pytest.mark.parametrize("spec", ["magnify,4", "magnify,stride", "magnify,", "magnify,a-b=3", "magnify,a=1,a=2"])
def test_what_is_no_spec(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"^method='{re.escape(spec)}' is no spec, for '.*': give NAME,option=value"):
        specs.resolve("method", spec)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("method", "cutdifusion", r"^method='cutdifusion' is not one of direct, .*climb, or module:"),
        ("method", "cutdifusion", r"did you mean 'cutdiffusion'\?$"),
        ("solver", "zzz", r"^solver='zzz' is not one of euler, ddim, .*of your own$"),
        ("schedule", "karas", r"^schedule='karas' is not one of model, .*did you mean 'karras'\?$"),
        ("guidance", "", r"^guidance='' is not one of cfg, "),
        ("guidance", ":x", r"^guidance=':x' is not one of cfg, "),
        ("method", "os:", r"^method='os:' is not one of direct, "),
        ("method", ".os:path", r"^method='.os:path' is not one of direct, "),
        ("method", 3, r"^method=3 must be a dataclass with `stages\(run\)`, or a function of a `Run`, or a name of "),
        ("solver", len, r"^solver=.* must be an object with `start\(schedule, noise\)`, or a name of euler, "),
        ("schedule", object(), r"^schedule=.* must be an object with `sigmas\(model_noise, num_steps\)`, or a list"),
        ("guidance", None, r"^guidance=None must be a function of \(conditional, unconditional, sigma, step\), or a "),
        ("method", "no_such_module:Mine", r"^method='no_such_module:Mine': there is no module 'no_such_module' where"),
        ("method", "os.no_such:Mine", r"^method='os.no_such:Mine': there is no module 'os.no_such' where Python looks"),
        ("method", "json:Mine", r"^method='json:Mine': the module json has no 'Mine'$"),
        ("method", "json:dmps", r"^method='json:dmps': the module json has no 'dmps': did you mean 'dumps'\?$"),
        ("method", "json:__version", r"^method='json:__version': the module json has no '__version'"),
        ("method", "magnify,strid=4", r"^method=magnify: strid is no option of .*stride, .*did you mean 'stride'\?$"),
        ("method", "magnify,eta=1", r"^method=magnify: eta is no option of .*\), but of ddim, euler_ancestral, "),
        ("method", "imax,positions=ntk", r"\), but of the run: give positions \(--positions\) by itself$"),
        ("schedule", "list,sigmas=3", r"^schedule=list: sigmas is no option of schedule list \(values\)"),
        ("schedule", "list", r"^schedule=list needs values: give NAME,values=value$"),
        ("positions", "dype,method=yarn", r"^positions=dype: method is no option of positions dype \([^)]*\)$"),
        ("method", "direct,stride=4", r"^method=direct has no options, so stride cannot be given$"),
        ("method", "magnify,stride=1.5", r"^stride=1\.5 must be a whole number at least 1 or None$"),
        ("schedule", "1,x,0", r"^schedule='1,x,0' must be numbers with commas between them$"),
        ("schedule", [3], r"^schedule=\(3\.0,\) must hold two sigmas or more, falling, the last one 0$"),
        ("schedule", [3, "x"], r"^values=3, 'x' must be a list, each a finite number at least 0$"),
    ],
)  # fmt: skip
def test_an_error_names_kind_value_what_is_known_and_a_near_miss(kind: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        specs.resolve(kind, value)
    assert "\n" not in str(error.value)


# ---- Objects of one's own


@pytest.fixture
def methods(own: OwnModules) -> OwnModules:
    own.write("mine_methods", METHODS)
    return own


def test_a_dataclass_a_function_and_an_instance(methods: OwnModules) -> None:
    mine = Settings(method="mine_methods:Mine,strength=2", number=4).method
    assert (type(mine).__name__, mine.strength, mine.number, mine.words) == ("Mine", 2.0, 4, "plain")
    assert type(mine.strength) is float
    assert Settings(method="mine_methods:plain").method_name == "plain"
    made = Settings(method="mine_methods:made")
    assert made.method.strength == 3
    assert replace(made, strength=4).method.strength == 4
    assert Settings(method=mine).method is mine
    assert Settings(method=type(mine)).method == type(mine)()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine_methods:Min", "has no 'Min': did you mean 'Mine'?"),
        ("mine_methods:nothing", "method=3 must be a dataclass with `stages(run)`"),
        ("mine_methods:Needy", "method=Needy needs strength: give NAME,strength=value"),
        ("mine_methods:plain,strength=2", "method=plain has no options, so strength cannot be given"),
        ("mine_methods:Mine,strength=11", "strength=11 must be a finite number in 0 … 10"),
        ("mine_methods:Mine,strength=nan", "strength='nan' must be a finite number in 0 … 10"),
        ("mine_methods:Mine,number=1.0", "number=1.0 must be a whole number"),
        ("mine_methods:Mine,kind=sof", "kind='sof' is not one of soft, hard: did you mean 'soft'?"),
        ("mine_methods:Mine,level=3", "level=3 must be one of 1, 2"),
        ("mine_methods:Mine,on=1", "on=1 must be True or False"),
        ("mine_methods:Mine,pair=(1,2,3)", "pair=1, 2, 3 must be 2 values, each a finite number"),
        ("mine_methods:Mine,many=(1,2.5)", "many=1, 2.5 must be a list, each a whole number"),
        ("mine_methods:Strict,strength=5", "five is too much"),
        ("mine_methods:Strict,strength=x", "strength='x' must be a finite number"),
    ],
)
def test_what_cannot_be_had_of_ones_own(spec: str, message: str, methods: OwnModules) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(method=spec)
    arguments = parse(["--method", spec])
    with pytest.raises(BadArgument, match=re.escape(message.rpartition("=")[2])):
        read_requests(arguments)


def test_a_module_that_fails_is_one_line(own: OwnModules, command_line: CommandLine) -> None:
    own.write("broken", "import no_such_module\n")
    command_line.refuses(["--method", "broken:Mine"], 2, "there is no module 'no_such_module' where Python looks")
    own.write("broken", "x = = 3\n")
    command_line.refuses(["--method", "broken:Mine"], 2, "SyntaxError: invalid syntax (broken.py, line 1)")
    own.write("broken", "import os\nos.nothing\n")
    command_line.refuses(["--method", "broken:Mine"], 2, "AttributeError: module 'os' has no attribute 'nothing'")
    own.write("broken", "raise SystemExit(3)\n")
    command_line.refuses(["--method", "broken:Mine"], 2, "importing broken failed, SystemExit: 3")
    own.write("mine_methods", METHODS)
    line = command_line.refuses(["--method", "mine_methods:Strict,strength=5"], 2)
    assert line == "five is too much"


# ---- Types


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 1, 1.0),
        (float, 1.5, 1.5),
        (int, 2, 2),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (tuple[float, ...], (1, 2, 3), (1.0, 2.0, 3.0)),
        (float | None, None, None),
        (float | None, 3, 3.0),
        (Literal["a", "b"], "b", "b"),
        (Literal[1, 2], 2, 2),
        (str, "1", "1"),
        (bool, True, True),
        (Any, [1], [1]),
    ],
)
def test_a_value_gets_the_type_of_its_option(kind: Any, value: Any, expected: Any) -> None:
    found = checked("name", value, kind)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 1.0),
        (int, "1"),
        (float, True),
        (float, "1"),
        (float, float("nan")),
        (float, float("inf")),
        (float, 1e39),
        (float, None),
        (tuple[float, float], (1, 2, 3)),
        (tuple[float, float], 1.0),
        (tuple[float, float], (1, float("nan"))),
        (tuple[float, ...], "12"),
        (Literal["a", "b"], "c"),
        (Literal[1, 2], True),
        (str, 1),
        (str, None),
        (bool, 1),
        (bool, "yes"),
    ],
)
def test_a_value_of_another_type_is_none(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^name={re.escape(short(value))} (must be|is not one of) ."):
        checked("name", value, kind)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (float, "1", 1.0),
        (float | None, "None", None),
        (float | None, "null", None),
        (bool, "true", True),
        (str, "None", "None"),
        (str | None, "None", None),
        (str, "'quoted'", "'quoted'"),
        (tuple[float, float], "1,2", (1.0, 2.0)),
        (Literal["none", "some"], "none", "none"),
        (Any, "{'a': 1}", {"a": 1}),
        (Any, "plain", "plain"),
    ],
)
def test_a_text_is_read_for_the_type_of_its_option(kind: Any, text: str, expected: Any) -> None:
    assert read("name", text, kind) == expected


# ---- Options that are not there, or twice

WITH_STRIDE = "multidiffusion, upsample_guidance, cutdiffusion, demofusion, accdiffusion, magnify, climb"
DIRECT = "method direct (none), solver euler (none), schedule model (none) or guidance cfg (guidance_scale)"


def test_an_option_that_a_method_lacks_in_python() -> None:
    with pytest.raises(ValueError, match=re.escape(f"stride=4 is no option of {DIRECT}, but of multidiffusion, ")):
        Settings(method="direct", stride=4)
    with pytest.raises(ValueError, match="did you mean 'num_steps'"):
        Settings(num_step=4)
    with pytest.raises(ValueError, match=r"^eta=0\.5 is no option of .*, but of ddim, .*, dpmpp_sde, apg$"):
        replace(Settings(), eta=0.5)


def test_an_option_that_a_method_lacks_on_command_lines(tmp_path: Path, command_line: CommandLine) -> None:
    message = f"is no option of {DIRECT}, but of {WITH_STRIDE}"
    command_line.refuses(["--method", "direct", "--stride", "8"], 2, f"--stride {message}")
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "a", "method": "direct", "stride": 8}\n')
    command_line.refuses(["--prompts", file], 2, f"{file}, line 1: --stride 8 {message}")


def test_an_option_that_a_method_lacks_in_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert evaluate(["--methods", "magnify", "direct", "--set", "stride=8", "--out", str(out)]) == 2
    assert capsys.readouterr().err == (f"cutdiff: --set stride='8' is no option of {DIRECT}, but of {WITH_STRIDE}\n")
    assert not out.exists()


def test_an_option_of_two_is_given_in_a_spec(methods: OwnModules, command_line: CommandLine) -> None:
    clashing = "mine_methods:Clashing"
    message = "is an option of method Clashing and guidance cfg: give it in a spec, as NAME,guidance_scale=2"
    with pytest.raises(ValueError, match=f"^guidance_scale=2 {message}$"):
        Settings(method=clashing, guidance_scale=2)
    command_line.refuses(["--method", clashing, "--guidance-scale", "2"], 2, f"--guidance-scale 2.0 {message}")
    settings = Settings(method=f"{clashing},guidance_scale=2", guidance="cfg,guidance_scale=3")
    assert (settings.method.guidance_scale, settings.guidance.guidance_scale) == (2, 3)


def test_options_go_to_whose_they_are() -> None:
    settings = Settings(solver="ddim", eta=0.5, structure_fraction=1, num_steps=3, phi=0.1, guidance="rescale")
    assert settings.solver == DDIM(eta=0.5)
    assert settings.method == CutDiffusion(structure_fraction=1.0)
    assert replace(settings, structure_fraction=0.2, method="magnify").method == Magnify(structure_fraction=0.2)
    assert replace(settings, num_steps=4).solver == DDIM(eta=0.5)
    assert settings.method_name == "cutdiffusion"
    assert Settings(method="direct").method is direct
    described = settings.described()
    assert described["solver"] == "ddim,eta=0.5"
    assert {field.name for field in fields(Settings)} - {*LATER} == set(described)
    assert Settings(**described) == settings


# ---- Help


def test_help_lists_the_options_of_ones_own(methods: OwnModules, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--method", "mine_methods:Mine", "--solver", "ddim", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "options of method Mine:" in shown
    assert "how strong it is (1.0)" in shown
    assert "--eta" in shown
    assert "A second sentence" not in shown


def test_flags_of_ones_own_are_read_for_their_types(methods: OwnModules) -> None:
    arguments = ["--strength=2", "--pair", "1", "2", "--many", "(3,4)", "--on", "--maybe", "None", "--words", "a, 'b'"]
    options = parse(["--method", "mine_methods:Mine", *arguments]).options
    mine = Settings(**options).method
    assert (mine.strength, mine.pair, mine.many) == (2.0, (1.0, 2.0), (3, 4))
    assert (mine.on, mine.maybe, mine.words) == (True, None, "a, 'b'")
    with pytest.raises(BadArgument, match=r"argument --number: 1\.5 must be a whole number"):
        parse(["--method", "mine_methods:Mine", "--number", "1.5"])


def test_names_import_no_torch() -> None:
    code = (
        "import sys; from cutdiff import specs; from cutdiff.cli.arguments import parse;"
        "specs.parse('method', 'magnify,stride=4'); parse(['--method', 'magnify,stride=4', '--steps', '3']);"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_two_threads_may_ask_for_options_at_once() -> None:
    """Though each is interrupted as it reads the source, as by a garbage collector that runs code of Python's."""

    def interrupted(phase: str, info: dict[str, int]) -> None:
        time.sleep(1e-4)

    threshold = gc.get_threshold()
    gc.callbacks.append(interrupted)
    gc.set_threshold(200)
    try:
        with ThreadPoolExecutor(4) as pool:
            docs = [*pool.map(_docs.__wrapped__, [Magnify] * 16)]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(interrupted)
    assert docs == [_docs(Magnify)] * 16
