"""Feed damaged safetensors files and indexes to the reader: `python tests/fuzz_read.py --num 100000 --seed 0`.

Each must be read or refused with one line of ValueError, in under a second of processor time and 64 MiB of memory.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import safe_open

from cutdiff.checkpoint.read import find_weights, read_tensors

MEMORY = 64 * 2**20
STEM = "model"
INDEX, SHARDS = f"{STEM}.safetensors.index.json", ("a.safetensors", "b.safetensors")
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 8, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 8.0, 1e300),
    *(float("nan"), float("inf"), "", "F32", "F16", "I8", "F4", "F8_E4M3", "BOOL", "x", "\0", "\n", "\ud800", "é" * 50),
    *("../a.safetensors", "/etc/passwd", "C:\\a.safetensors", "a.bin", "b.safetensors", "__metadata__", "shape"),
    *([], {}, [0, 8], [8, 0], [1] * 70, [2**62, 2**62, 0], {"a": {"b": []}}),
)
FRAGMENTS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b" " * 9,
    ),
    *(b"NaN", b"-Infinity", b"1e9", b"-0", b"00", b"1" * 5000, b"[" * 10_000, b'{"a":' * 10_000, b"null", b"<html>"),
    *(b"version https://git-lfs", b"GGUF", b"PK\x03\x04", b"\x80\x04\x95", b'"dtype":"F32",', b'"__metadata__":{},'),
)


def valid_file(names: str, metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file with a tensor for each letter, one of them without elements."""
    kinds = (("F32", [2, 3], 24), ("F16", [4], 8), ("I64", [], 8), ("BF16", [0, 5], 0), ("F8_E5M2", [1, 2, 3], 6))
    header, end = dict[str, Any](__metadata__=metadata), 0
    for name, (dtype, shape, size) in zip(names, kinds, strict=False):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, bytes(range(end))


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one of its members, at any depth, replaced, removed, renamed, copied or added."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE)
    value = value.copy()
    if isinstance(value, list):
        i = rng.randrange(len(value))
        value[i : i + rng.randrange(2)] = [mutate_json(value[i], rng)] * rng.randrange(3)
        return value
    key, other = rng.choice([*value]), rng.choice([*value])
    match rng.randrange(6):
        case 0:
            del value[key]
        case 1:
            value[str(rng.choice(STRANGE))] = value.pop(key)
        case 2:
            value[other] = value[key]
        case _:
            value[key] = mutate_json(value[key], rng)
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes with a few flipped, cut off, doubled, moved or replaced by a fragment that means something."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(damaged) + 1)
        stop = min(len(damaged), start + rng.choice((0, 1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                damaged[start:stop] = rng.choice(FRAGMENTS)
            case 1:
                del damaged[start:]
            case 2:
                del damaged[start:stop]
            case 3:
                damaged[start:start] = damaged[start:stop]
            case 4:
                damaged[start:stop] = rng.randbytes(stop - start)
            case _ if damaged:
                damaged[min(start, len(damaged) - 1)] ^= 1 << rng.randrange(8)
            case _:
                pass
    return bytes(damaged)


def damaged_file(rng: random.Random) -> bytes:
    header, data = valid_file("abcde", {"format": "pt"})
    kind = rng.randrange(4)
    for _ in range(rng.choice((1, 1, 2)) if kind < 2 else 0):
        header = mutate_json(header, rng)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    if kind == 1:
        data = mutate_bytes(data, rng)
    if kind == 2:
        text = mutate_bytes(text, rng)
    content = packed(text, data)
    return mutate_bytes(content, rng) if kind == 3 else content


def damaged_index(rng: random.Random) -> bytes:
    index: Any = {"metadata": {"total_size": 92}, "weight_map": {**dict.fromkeys("ab", SHARDS[0]), "c": SHARDS[1]}}
    kind = rng.randrange(2)
    for _ in range(rng.choice((1, 1, 2)) if kind == 0 else 0):
        index = mutate_json(index, rng)
    text = json.dumps(index).encode()
    return mutate_bytes(text, rng) if kind else text


def read_file(folder: Path, rng: random.Random) -> None:
    """Read a damaged file; if it is accepted, the safetensors library must read it too."""
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged_file(rng))
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        assert {*file.keys()} == {*tensors}
    for tensor in tensors.values():
        tensor.view(-1).tolist()


def read_index(folder: Path, rng: random.Random) -> None:
    """Read a damaged index of sound shards; if it is accepted, it must have named nothing but those."""
    (folder / INDEX).write_bytes(damaged_index(rng))
    paths = find_weights(folder, STEM)
    assert {*paths} <= {folder / shard for shard in SHARDS}


def make_shards(folder: Path) -> None:
    for shard, names in zip(SHARDS, ("ab", "c"), strict=True):
        header, data = valid_file(names, {})
        (folder / shard).write_bytes(packed(json.dumps(header).encode(), data))


@contextmanager
def limits(memory: int = MEMORY, seconds: float = 1) -> Iterator[None]:
    """Limit the memory that the block adds, where the kernel tells how much that is, and its processor time.

    The block may also take no more than a minute by the clock, after which it counts as hanging.
    """

    def stop(number: int, _: object) -> NoReturn:
        raise AssertionError(f"took more than {seconds} s" if number == signal.SIGPROF else "hangs")

    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 60)}
    handlers = {number: signal.signal(number, stop) for number in timers}
    if (statm := Path("/proc/self/statm")).exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    for timer, most in timers.values():
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(target: Callable[[Path, random.Random], None], folder: Path, rng: random.Random) -> str:
    """ "read", or the words of the refusal that do not depend on the file. Any other error is raised."""
    with limits():
        try:
            target(folder, rng)
        except ValueError as error:
            refusal = error
        else:
            return "read"
    message = str(refusal)
    assert type(refusal) is ValueError, f"{type(refusal).__name__}: {message}"
    assert message.isprintable(), f"not one printable line: {message!r}"
    assert len(message) < 2000, f"{len(message)} characters"
    assert message.startswith(str(folder)), f"does not name the file: {message}"
    return " ".join(re.sub(r"'.*?'|\d+", "·", message.removeprefix(str(folder))).split()[1:5])


def count_outcomes(num: int, seed: int, case: Callable[[int, random.Random], str]) -> None:
    """Print how often each outcome came of `num` cases; an error of one says which it was."""
    outcomes: Counter[str] = Counter()
    for i in range(num):
        try:
            outcomes[case(i, random.Random(f"{seed}/{i}"))] += 1
        except BaseException as error:
            error.add_note(f"case {i} of seed {seed}")
            raise
    for words, count in outcomes.most_common():
        print(f"{count:8} {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder)
        targets = (read_index, read_file, read_file, read_file)
        count_outcomes(args.num, args.seed, lambda i, rng: outcome(targets[i % 4], folder, rng))


if __name__ == "__main__":
    main()
