"""Valid files, damaged: bytes and messages are changed, dropped, doubled and swapped, and `optimize` must refuse or succeed.

As a program, ``python -m tests.fuzz.mutate [--cases N] [--seed S]`` runs N damaged files in processes of their own and prints what became
of them; ``--show I`` writes the file of one case to ``mutated.onnx``.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError

from magr_onnx.models.zoo import ZOO
from tests.fuzz import isolated
from tests.fuzz.generate import make
from tests.fuzz.judge import ALL, OPTIONS, Outcome, judge
from tests.fuzz.odd import make_odd

GENERATED = 40
INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    16,
    255,
    1 << 16,
    1 << 24,
    1 << 31,
    (1 << 31) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    -(1 << 31),
    -(1 << 63),
)
NUMBERS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "x", "w", "MatMul", "ai.onnx", "com.microsoft", "../x", "/dev/zero", "\0", "ü" * 40, "n" * 5000)


@dataclass(frozen=True, slots=True)
class Base:
    """A valid model with inputs for it, and its external data."""

    model: onnx.ModelProto
    feeds: dict[str, Any]
    calibration: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)


@functools.cache
def bases() -> tuple[Base, ...]:
    """The zoo, random graphs, some of them of odd forms, and some of either with external data."""
    rng = np.random.default_rng(0)
    found = [Base(t.build(), t.feeds(rng), [t.feeds(rng) for _ in range(4)]) for t in ZOO.values()]
    made = (maker(random.Random(seed)) for maker in (make, make_odd) for seed in range(GENERATED))
    found += [Base(m.model, m.feeds, m.calibration) for m in made]
    return (*found, *(external(base) for base in found[::4]))


def external(base: Base) -> Base:
    """The same model with its raw tensors in a file."""
    model = onnx.ModelProto()
    model.CopyFrom(base.model)
    data = b""
    for tensor in model.graph.initializer:
        if tensor.raw_data and tensor.data_type != onnx.TensorProto.STRING:
            for key, value in (("location", "data.bin"), ("offset", str(len(data))), ("length", str(len(tensor.raw_data)))):
                tensor.external_data.add(key=key, value=value)
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    return Base(model, base.feeds, base.calibration, {"data.bin": data})


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes to the bytes of a file."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        b = min(b, a + rng.choice((1, 4, 64, 4096)))
        kind = rng.randrange(6)
        if kind == 0 and a < len(out):
            out[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[a:b]
        elif kind == 2:
            out[a:a] = out[a:b]
        elif kind == 3:
            out[a:b] = rng.randbytes(b - a)
        elif kind == 4:
            out[a:a] = rng.choice((b"\xff" * 9 + b"\x01", b"\x80" * 9 + b"\x01", b"\x00", b"\x0a"))
        elif rng.random() < 0.2:
            del out[a:]
    return bytes(out)


def damaged_message(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """One to four changes to the fields of a model, anywhere in it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for _ in range(rng.randint(1, 4)):
        places = list(_places(copy))
        message, fields = rng.choice(places)
        _change(message, rng.choice(fields), rng, places)
    try:
        return bytes(copy.SerializeToString())
    except EncodeError:  # too deep to be written
        return bytes(model.SerializeToString())


Place = tuple[Any, list[FieldDescriptor]]


def _places(message: Any) -> Iterator[Place]:
    """Every message in a message, itself included, with the fields it has."""
    present = [descriptor for descriptor, _ in message.ListFields()]
    if present:
        yield message, present
    for descriptor in present:
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            value = getattr(message, descriptor.name)
            for inner in value if _repeated(descriptor) else [value]:
                yield from _places(inner)


def _repeated(descriptor: FieldDescriptor) -> bool:
    return hasattr(descriptor, "is_repeated") and bool(descriptor.is_repeated)


def _change(message: Any, descriptor: FieldDescriptor, rng: random.Random, places: Sequence[Place]) -> None:
    name = descriptor.name
    value = getattr(message, name)
    if rng.random() < 0.2:
        message.ClearField(name)
    elif _repeated(descriptor):
        i, j = rng.randrange(len(value)), rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            del value[i]
        elif kind == 1:
            value.append(value[i])
        elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            other = type(value[i])()
            other.CopyFrom(value[j])
            if kind == 2:
                _graft(value[i], rng, places)
            value[j].CopyFrom(value[i])
            value[i].CopyFrom(other)
        else:
            value[i] = _scalar(descriptor, value[i], rng, places)
    elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        _graft(value, rng, places)
    else:
        setattr(message, name, _scalar(descriptor, value, rng, places))


def _graft(message: Any, rng: random.Random, places: Sequence[Place]) -> None:
    """Put another message of the same kind in its place."""
    same = [m for m, _ in places if type(m) is type(message)]
    if same:
        copy = type(message)()
        copy.CopyFrom(rng.choice(same))
        message.CopyFrom(copy)


def _scalar(descriptor: FieldDescriptor, value: Any, rng: random.Random, places: Sequence[Place]) -> Any:
    kind = descriptor.cpp_type
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([v.number for v in descriptor.enum_type.values])
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(NUMBERS)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if descriptor.type == FieldDescriptor.TYPE_BYTES:
            return damaged_bytes(bytes(value), rng)
        names = [n for m, _ in places if isinstance(m, onnx.NodeProto) for n in (*m.input, *m.output, m.op_type)]
        return rng.choice([*WORDS, *names, *names])
    low, high = (-(1 << 31), (1 << 31) - 1) if kind == FieldDescriptor.CPPTYPE_INT32 else (-(1 << 63), (1 << 63) - 1)
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        low = 0
    near = (int(value) + 1, int(value) - 1, 2 * int(value))
    return rng.choice([v for v in (*INTEGERS, *near, *near) if low <= v <= high])


class Cases(Sequence[int]):
    """Seeds from one on, for as long as one asks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: Any) -> Any:
        return self.seed + index


def case(seed: int) -> tuple[bytes, Base]:
    """The damaged file of a seed, and what it was made from."""
    rng = random.Random(seed)
    base = rng.choice(bases())
    if rng.random() < 0.3:
        return damaged_bytes(base.model.SerializeToString(), rng), base
    return damaged_message(base.model, rng), base


def run(seed: int, at: Callable[[str], None]) -> Outcome:
    """One damaged file, in one of the formats, with calibration data or without."""
    data, base = case(seed)
    rng = random.Random(-seed - 1)
    name = rng.choice(list(OPTIONS))
    calibration = base.calibration if rng.random() < 0.3 else None
    options = OPTIONS[name] | ALL | ({"effort": "fast"} if calibration and rng.random() < 0.7 else {})
    outcome = judge(data, base.feeds, options, calibration, at, base.files, same_numbers(data, base.model))
    if outcome.bug and outcome.layers + ("please report" in outcome.detail) and _lies(data, base.model):
        return Outcome("refused or wrong, where declared shapes are", outcome.detail)
    return outcome


def _lies(data: bytes, base: onnx.ModelProto) -> bool:
    """Whether a damaged file declares types or shapes that the valid one does not: onnxruntime takes the word of some and not of others."""
    return not _declared(onnx.ModelProto.FromString(data)) <= _declared(base)


def _declared(model: onnx.ModelProto) -> set[bytes]:
    return {m.SerializeToString(deterministic=True) for m, _ in _places(model) if isinstance(m, onnx.ValueInfoProto)}


def same_numbers(data: bytes, base: onnx.ModelProto) -> bool:
    """Whether a damaged file has no weights or factors that the valid one has not: 8 bits are not enough for wild ones."""
    try:
        return _numbers(onnx.ModelProto.FromString(data)) <= _numbers(base)
    except (DecodeError, UnicodeDecodeError):
        return False


def _numbers(model: onnx.ModelProto) -> set[bytes]:
    found = set()
    for message, _ in _places(model):
        if isinstance(message, onnx.TensorProto):
            found.add(onnx.TensorProto(raw_data=message.raw_data, float_data=message.float_data).SerializeToString())
            found.update(entry.SerializeToString() for entry in message.external_data)
        elif isinstance(message, onnx.AttributeProto) and message.type == onnx.AttributeProto.FLOAT:
            found.add(np.float32(message.f).tobytes())
    return found


def campaign(count: int, seed: int) -> list[tuple[int, Outcome]]:
    """What became of ``count`` files, by seed; onnxruntime's own deaths on the damaged file are no bugs of ours."""
    found = isolated.outcomes("tests.fuzz.mutate", ["--worker", "--seed", str(seed)], range(count))
    return [(seed + i, _blame(outcome)) for i, outcome in found]


def _blame(outcome: Outcome) -> Outcome:
    died = outcome.kind == "timeout" or "SIG" in outcome.detail
    if outcome.kind in ("crash", "timeout") and died and outcome.detail.startswith("at float"):
        return Outcome(f"onnxruntime: {outcome.kind} on the damaged file", outcome.detail)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--show", type=int)
    given = parser.parse_args()
    if given.worker:
        isolated.serve(Cases(given.seed), run)
        return 0
    if given.show is not None:
        Path("mutated.onnx").write_bytes(case(given.show)[0])
        return 0
    found = campaign(given.cases, given.seed)
    print(f"seeds {given.seed} to {given.seed + given.cases - 1}")
    print(isolated.table([outcome for _, outcome in found]))
    for seed, outcome in found:
        if outcome.bug or outcome.kind.startswith("onnxruntime:"):
            print(f"seed {seed}: {outcome.kind}: {outcome.detail[:300]}")
    return sum(outcome.bug for _, outcome in found)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
