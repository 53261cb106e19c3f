"""Runs that are killed and go on: the same bytes, nothing trusted that is damaged, nothing mixed that differs."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.errors import OptionError, OutputError
from magr_onnx.model_io.atomic import lock
from magr_onnx.model_io.writing import data_files
from magr_onnx.models import bundled
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.workflow.checkpoint import LAYERS, MANIFEST
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import proto
from tests.helpers import PATIENCE

KILLED = Path(__file__).parents[1] / "killed.py"
Batches = list[dict[str, Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "feedback": {"effort": "balanced", "bits": 3},
    "low-rank": {"effort": "fast", "low_rank": 4, "bias": "any"},
    "qdq": {"effort": "fast", "format": "qdq"},
    "int8": {"format": "qdq-int8"},
    "dynamic": {"format": "dynamic-int8"},
    "magr only": {"pipeline_text": "magr{alpha=1e-3}"},
    "fake": {"pipeline_text": "magr{alpha=1e-3},quantize{method=gptq},compensate-bias"},
    "mixed": {"effort": "fast", "target_size": "70%"},
    "equalized": {"effort": "fast", "equalize": True},
    "rotated": {"effort": "fast", "rotate": "auto"},
    "in stages": {"effort": "fast", "max_memory": "1kB"},
    "data-free": {"effort": "fast"},
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    np.savez(path, input_ids=np.load(bundled.CALIBRATION)["input_ids"][:32])
    return path


def written(path: Path) -> list[bytes]:
    """The bytes of a model, and of its data."""
    return [p.read_bytes() for p in (path, *sorted(data_files(path)))]


def plain_row(row: LayerRow) -> Any:
    """As the JSON report has it: tuples are lists there."""
    return json.loads(json.dumps(asdict(row)))


def layer_files(job: Path) -> list[Path]:
    return sorted((job / LAYERS).glob("*.npz"))


@pytest.mark.parametrize("name", SETTINGS)
def test_with_and_without_a_job_directory_the_bytes_are_the_same(name: str, tmp_path: Path) -> None:
    samples = None if name == "data-free" else [graphs.feeds(graphs.chain(), seed=i) for i in range(8)]
    same_after_a_kill(chain_file(tmp_path), samples, SETTINGS[name], tmp_path)


@pytest.mark.parametrize("name", ["int8", "dynamic", "low-rank", "fake"])
def test_a_run_whose_layers_are_all_finished_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Nothing is measured any more, but the grids of inputs and outputs are as they were."""
    model, samples = chain_file(tmp_path), [graphs.feeds(graphs.chain(), seed=i) for i in range(8)]
    options = SETTINGS[name] | ({"quantize_outputs": True} if name == "int8" else {})
    files = []
    for run_number in range(2):
        output = tmp_path / f"{run_number}.onnx"
        magr_onnx.optimize(model, samples, output=output, resume=tmp_path / "job", **options)
        files.append(written(output))
    assert files[0] == files[1]


def test_error_feedback_in_many_stages_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    samples = [graphs.feeds(graphs.deep(), 64, seed=i) for i in range(4)]
    same_after_a_kill(deep_file(tmp_path), samples, {"effort": "balanced", "bits": 3}, tmp_path)


@pytest.mark.parametrize("memory", [None, "1kB"])
def test_layers_that_share_a_weight_go_on_to_the_same_bytes(memory: str | None, tmp_path: Path) -> None:
    b = graphs.Builder()
    x = b.input("x", ["batch", 48])
    weight = b.constant("w", graphs.random(48, 48))
    one = b.node("Tanh", [b.node("MatMul", [x, weight], "one")])
    both = b.node("Mul", [one, b.node("MatMul", [x, weight], "beside")])
    model = b.model(b.node("MatMul", [both, weight], "two"), ["batch", 48])
    onnx.save(proto(model), tmp_path / "model.onnx")
    samples = [graphs.feeds(model, seed=i) for i in range(8)]
    same_after_a_kill(tmp_path / "model.onnx", samples, {"effort": "fast", "max_memory": memory}, tmp_path)


def test_a_budget_that_plans_again_takes_nothing_from_its_first_plan(tmp_path: Path) -> None:
    """Layers whose errors add up: their sum loses more than was predicted, so they get more bits in the second plan."""
    b = graphs.Builder()
    x = b.input("x", ["batch", 64])
    product = b.node("MatMul", [x, b.constant("w0", graphs.random(64, 32))], "twin_0")
    for i in (1, 2, 3):
        product = b.node("Add", [product, b.node("MatMul", [x, b.constant(f"w{i}", graphs.random(64, 32))], f"twin_{i}")])
    model = b.model(product, ["batch", 32], "logits")
    onnx.save(proto(model), tmp_path / "model.onnx")
    samples = [graphs.feeds(model, 64, seed=i) for i in range(8)]
    plain, kept = tmp_path / "plain.onnx", tmp_path / "kept.onnx"
    magr_onnx.optimize(tmp_path / "model.onnx", samples, output=plain, effort="fast", max_loss="0.2")
    _, report = magr_onnx.optimize(tmp_path / "model.onnx", samples, output=kept, effort="fast", max_loss="0.2", resume=tmp_path / "job")
    assert report.assignment is not None
    assert len(report.assignment.attempts) > 1
    assert kept.read_bytes() == plain.read_bytes()


def same_after_a_kill(model: Path, samples: Batches | None, options: dict[str, Any], folder: Path) -> None:
    """Without a job directory, with one, and with one that lacks every second layer: one and the same file."""
    plain, kept, half = (folder / n / "out.onnx" for n in ("plain", "kept", "half"))
    for path in (plain, kept, half):
        path.parent.mkdir()
    job = folder / "job"
    magr_onnx.optimize(model, samples, output=plain, **options)
    _, first = magr_onnx.optimize(model, samples, output=kept, resume=job, **options)
    assert written(kept) == written(plain)
    whole = layer_files(job)
    assert len(whole) == len(first.layers)
    for path in whole[::2]:  # as if the run had been killed half-way, at its worst: with holes
        path.unlink()
    _, second = magr_onnx.optimize(model, samples, output=half, resume=job, **options)
    assert written(half) == written(plain)
    assert any(f"{len(whole) // 2} layers were finished before" in note for note in second.notes) == (len(whole) > 1)
    assert layer_files(job) == whole
    for a, b in zip(first.layers, second.layers, strict=True):
        assert plain_row(a) == plain_row(b)


@pytest.mark.long
def test_runs_in_other_processes_give_the_same_bytes(tmp_path: Path) -> None:
    model = deep_file(tmp_path)
    out = [tmp_path / f"{i}.onnx" for i in range(2)]
    for i, path in enumerate(out):
        command = [
            sys.executable,
            "-m",
            "magr_onnx.cli.main",
            "optimize",
            model,
            "-o",
            path,
            "-c",
            model.with_suffix(".npz"),
            "-q",
            "--bits",
            "3",
        ]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(i)}, timeout=PATIENCE)
    assert out[0].read_bytes() == out[1].read_bytes()


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_with_the_same_file(tmp_path: Path) -> None:
    model = deep_file(tmp_path)
    job, out, plain = tmp_path / "job", tmp_path / "out.onnx", tmp_path / "plain.onnx"
    arguments = ["optimize", model, "-c", model.with_suffix(".npz"), "--effort", "fast", "--quiet"]
    assert run(*arguments, "-o", plain).returncode == 0
    out.write_bytes(b"precious")
    command = [*map(str, arguments), "-o", str(out), "--resume", str(job)]
    done = -1
    for kills in (1, 4, 5, 1):  # of renames: the manifest, then a layer each; the last one kills the final write
        code = subprocess.run([sys.executable, KILLED, str(kills), *command], check=False, timeout=PATIENCE).returncode
        assert code == -signal.SIGKILL
        assert out.read_bytes() == b"precious"
        finished = len(layer_files(job)) if job.exists() else 0
        assert finished > done
        done = finished
    assert done == 10
    assert run(*command).returncode == 0
    assert out.read_bytes() == plain.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep.npz", "deep.onnx", "job", "out.onnx", "plain.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_fifty_kills_at_random_moments(effort: str, calibration: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    arguments = ["optimize", bundled.MODEL, "-c", calibration, "--effort", effort, "--external-data", "--quiet"]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "magr_onnx.cli.main", *map(str, arguments), "-o", plain], check=True)
    length = time.perf_counter() - begin
    reference = data_files(plain)
    rng = random.Random(0)
    killed = finished = 0
    while killed < 25:
        command = [sys.executable, "-m", "magr_onnx.cli.main", *map(str, arguments), "-o", out, "--resume", tmp_path / f"job{finished}"]
        begin, process = time.perf_counter(), subprocess.Popen(command)
        try:
            process.wait(timeout=rng.uniform(0.1, 1.1) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        if process.wait() == 0:
            finished, length = finished + 1, min(length, time.perf_counter() - begin)
            assert [p.read_bytes() for p in data_files(out)] == [p.read_bytes() for p in reference]
            assert not list(tmp_path.glob(".out.onnx*"))
        else:
            assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert [p.read_bytes() for p in data_files(out)] == [p.read_bytes() for p in reference]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "option": ({"bits": 3}, "pipeline"),
    "layers": ({"exclude": ["*down*"]}, "option exclude"),
    "number of batches": ({"calibration": "fewer"}, "calibration"),
    "values of the data": ({"calibration": "others"}, "calibration"),
    "way": ({"max_memory": 1000}, "option large"),
}


def deep_file(folder: Path) -> Path:
    """A model of ten layers, each of which reads what the one before has computed, and its data beside it."""
    path = folder / "deep.onnx"
    onnx.save(proto(graphs.deep()), path)
    np.savez(folder / "deep.npz", **graphs.feeds(graphs.deep(), 256))
    return path


def chain_file(folder: Path, seed: int = 0) -> Path:
    model = proto(graphs.chain())
    path = folder / "model.onnx"
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]) + np.float32(seed)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_and_named(name: str, tmp_path: Path) -> None:
    data = [graphs.feeds(graphs.chain(), seed=i) for i in range(4)]
    path, out, job = chain_file(tmp_path), tmp_path / "out.onnx", tmp_path / "job"
    magr_onnx.optimize(path, data, output=out, resume=job)
    before = {p: p.read_bytes() for p in [out, *layer_files(job), job / MANIFEST]}
    changes, message = CHANGES[name]
    given = dict(changes)
    others = {"fewer": data[:3], "others": [*data[:3], {name: np.nextafter(x, x + 1) for name, x in data[3].items()}], None: data}
    other = others[given.pop("calibration", None)]
    with pytest.raises(OptionError) as caught:
        magr_onnx.optimize(path, other, output=out, resume=job, **given)
    assert f"  - {message}: was " in str(caught.value)
    assert "Give another directory, or delete this one" in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    path, out, job = chain_file(tmp_path), tmp_path / "out.onnx", tmp_path / "job"
    magr_onnx.optimize(path, output=out, resume=job)
    before = out.read_bytes()
    (tmp_path / "model.data").unlink()
    chain_file(tmp_path, seed=1)  # other weights, in the data file only
    with pytest.raises(OptionError, match=r"data file model.data: was \w+, is \w+"):
        magr_onnx.optimize(path, output=out, resume=job)
    assert out.read_bytes() == before


def test_two_processes_in_one_directory_are_refused(tmp_path: Path) -> None:
    path, job = chain_file(tmp_path), tmp_path / "job"
    job.mkdir()
    held = lock(job / "lock")
    assert held is not None
    with held, pytest.raises(OutputError, match="another run is working in it"):
        magr_onnx.optimize(path, output=tmp_path / "out.onnx", resume=job)
    magr_onnx.optimize(path, output=tmp_path / "out.onnx", resume=job)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def truncated(content: bytes, trap: Path) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes, trap: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        codes = archive.getinfo("codes.npy")
    middle = codes.header_offset + codes.file_size // 2  # between the headers of the archive no bit matters
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


def empty(content: bytes, trap: Path) -> bytes:
    return b""


def pickled(content: bytes, trap: Path) -> bytes:
    file = io.BytesIO()
    with np.load(io.BytesIO(content)) as arrays:
        np.savez(file, **{**arrays, "codes": np.array([Trap(trap)], dtype=object)})
    return file.getvalue()


def other_shape(content: bytes, trap: Path) -> bytes:
    file = io.BytesIO()
    with np.load(io.BytesIO(content)) as arrays:
        np.savez(file, **{**arrays, "scales": arrays["scales"][:1]})
    return file.getvalue()


def bomb(content: bytes, trap: Path) -> bytes:
    file = io.BytesIO()
    with np.load(io.BytesIO(content)) as arrays:
        np.savez_compressed(file, **{**arrays, "codes": np.zeros((1 << 14, 1 << 12), np.uint8)})
    return file.getvalue()


def encrypted(content: bytes, trap: Path) -> bytes:
    """One bit more in the directory of the archive: its entries call themselves encrypted."""
    at = content.rindex(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, empty, pickled, other_shape, bomb, encrypted])
def test_a_damaged_layer_is_computed_again(damage: Any, tmp_path: Path) -> None:
    data = [graphs.feeds(graphs.chain(), seed=i) for i in range(4)]
    path, out, job, trap = chain_file(tmp_path), tmp_path / "out.onnx", tmp_path / "job", tmp_path / "trap"
    magr_onnx.optimize(path, data, output=out, resume=job)
    before = out.read_bytes()
    for file in layer_files(job):
        file.write_bytes(damage(file.read_bytes(), trap))
    _, report = magr_onnx.optimize(path, data, output=out, resume=job)
    assert out.read_bytes() == before
    assert sum("was damaged" in note for note in report.notes) == 2
    assert not trap.exists()
    _, report = magr_onnx.optimize(path, data, output=out, resume=job)
    assert any("2 layers were finished before" in note for note in report.notes)


def test_a_damaged_manifest_and_a_folder_of_something_else_are_refused(tmp_path: Path) -> None:
    path, out, job = chain_file(tmp_path), tmp_path / "out.onnx", tmp_path / "job"
    magr_onnx.optimize(path, output=out, resume=job)
    for text in ('{"mod', "[1]"):
        (job / MANIFEST).write_text(text)
        with pytest.raises(OptionError, match=r"manifest.json is damaged.*delete the directory"):
            magr_onnx.optimize(path, output=out, resume=job)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"me")
    with pytest.raises(OptionError, match=r"it holds me.jpg; give a new directory"):
        magr_onnx.optimize(path, output=out, resume=other)
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (other / name).write_bytes(b"")
    with pytest.raises(OptionError, match=r"it holds a.jpg, b.jpg, c.jpg and 2 more; give a new directory"):
        magr_onnx.optimize(path, output=out, resume=other)
    with pytest.raises(OutputError, match=r"job directory .*model.onnx is a file; give the name of a directory"):
        magr_onnx.optimize(path, output=out, resume=path)


def test_a_model_in_memory_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="resume needs a model in a file"):
        magr_onnx.optimize(graphs.chain(), resume=tmp_path / "job")


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    for name in ("thesis.txt", "notes.tmp", "sub/more.tmp"):
        (folder / name).write_text("mine")
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    with pytest.raises(magr_onnx.OptionError, match="is not one"):
        magr_onnx.optimize(bundled.MODEL, output=tmp_path / "out.onnx", resume=folder, quantizer="rtn")
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before
