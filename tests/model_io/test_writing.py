"""Outputs of any size: shards, names that overwrite nothing in use, kills at every step, full disks."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import MagrError, OutputError
from magr_onnx.model_io import files, writing
from magr_onnx.model_io.atomic import lock, remove_stale, staging_directory
from magr_onnx.model_io.writing import Layout, save
from magr_onnx.models import bundled
from magr_onnx.runtime.calibration.fisher import Fisher
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import feeds, proto
from tests.helpers import PATIENCE

KILLED = Path(__file__).parents[1] / "killed.py"
EXTERNAL = Layout(external=True)


def answer(model: Path | ir.Model) -> bytes:
    """What onnxruntime computes with a chain, bit for bit."""
    with Session(model) as session:
        return b"".join(a.tobytes() for a in session.run(feeds(graphs.chain())))


def scaled(factor: float) -> ir.Model:
    """A chain of two layers whose first weight is multiplied."""
    model = graphs.chain()
    value = model.graph.initializers["w1"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name="w1")
    return model


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def data_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (path, *writing.data_files(path))}


def test_shards_are_each_below_their_size_and_run(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    _, before = magr_onnx.optimize(bundled.MODEL, output=whole)
    _, after = magr_onnx.optimize(bundled.MODEL, output=parts, shard_size="700 kB")
    shards = sorted(writing.data_files(parts))
    count = len(shards)
    assert count > 2
    assert [p.name for p in shards] == [f"parts.onnx-{i + 1:05d}-of-{count:05d}.data" for i in range(count)]
    assert all(p.stat().st_size <= 700_000 for p in shards)
    assert after.bytes_after == sum(p.stat().st_size for p in (parts, *shards))
    assert before.verified == after.verified == 21
    assert not [n for n in after.notes if "shard" in n]
    inputs = {"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:2]}
    with Session(whole) as a, Session(parts) as b:
        np.testing.assert_array_equal(a.run(inputs)[0], b.run(inputs)[0])
    onnx.checker.check_model(str(parts))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own_and_is_named(tmp_path: Path) -> None:
    _, report = magr_onnx.optimize(bundled.MODEL, output=tmp_path / "parts.onnx", shard_size=100_000)
    assert any("larger than a shard" in note for note in report.notes)


def test_small_tensors_alone_may_pass_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "INLINE_LIMIT", 100)
    b = graphs.Builder()
    x = b.input("x", ["batch", 4])
    y = x
    for i in range(40):
        y = b.node("Add", [y, b.constant(f"c{i}", np.full(4, i, np.float32))])
    out = tmp_path / "out.onnx"
    save(b.model(y, ["batch", 4]), out, layout=Layout(inline_limit=100))
    assert (tmp_path / "out.onnx.data").stat().st_size == 40 * 16
    with Session(out) as session:
        np.testing.assert_array_equal(session.run({"x": np.zeros((1, 4), np.float32)})[0], np.full((1, 4), sum(range(40)), np.float32))


def test_large_constant_nodes_go_to_the_data_file(tmp_path: Path) -> None:
    b = graphs.Builder()
    x = b.input("x", ["batch", 64])
    constant = b.node("Constant", [], value=ir.tensor(graphs.random(64, 64)))
    out = tmp_path / "out.onnx"
    save(b.model(b.node("MatMul", [x, constant]), ["batch", 64]), out, layout=EXTERNAL)
    assert (tmp_path / "out.onnx.data").stat().st_size == 4 * 64 * 64
    assert out.stat().st_size < 2000
    with Session(out) as session:
        session.run({"x": np.zeros((1, 64), np.float32)})


def test_a_source_in_many_files_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    onnx.save(proto(graphs.chain()), source / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    assert len(files.load(source / "m.onnx").external) == 4
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    magr_onnx.optimize(graphs.chain(), output=whole)
    magr_onnx.optimize(source / "m.onnx", output=parts)
    assert answer(whole) == answer(parts)


def test_the_data_of_an_old_output_is_not_overwritten_before_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    save(scaled(1), out, layout=EXTERNAL)
    assert names(tmp_path) == ["out.onnx", "out.onnx.data"]
    old = data_of(out)

    def verify(part: Path) -> None:
        assert data_of(out) == old  # while the new one is whole already
        assert answer(part) != answer(out)

    save(scaled(2), out, verify, EXTERNAL)
    new = data_of(out)
    assert len(new) == 2
    assert names(tmp_path) == sorted(new)  # the old data is gone, and nothing else is left
    save(scaled(2), out, layout=EXTERNAL)
    assert data_of(out) == new  # the same again is the same, names included
    save(scaled(1), out)
    assert names(tmp_path) == ["out.onnx"]  # inline: no data at all


def test_data_files_of_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    onnx.save(proto(graphs.chain()), out, save_as_external_data=True, location="shared.bin", size_threshold=0)
    save(scaled(2), out)
    assert names(tmp_path) == ["out.onnx", "shared.bin"]


def test_tensors_of_the_model_lie_in_the_new_files_afterwards(tmp_path: Path) -> None:
    model = scaled(3)
    save(model, tmp_path / "out.onnx", layout=EXTERNAL)
    assert answer(tmp_path / "out.onnx") == answer(model)


@pytest.mark.long
def test_a_kill_at_any_step_of_the_write_leaves_a_whole_model(tmp_path: Path) -> None:
    source, out = tmp_path / "source.onnx", tmp_path / "out.onnx"
    onnx.save(proto(graphs.chain()), source)
    arguments = ["optimize", source, "-o", out, "--bits", 8, "--shard-size", "5kB", "--quiet"]
    save(scaled(2), out, layout=EXTERNAL)
    old = data_of(out)
    assert run(*arguments).returncode == 0
    new, wanted = data_of(out), answer(out)
    assert len(new) > 2
    killed = 0
    for step in range(100):
        for path in tmp_path.glob("out.onnx*"):
            path.unlink()
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        code = subprocess.run([sys.executable, KILLED, str(step), *map(str, arguments)], check=False, timeout=PATIENCE).returncode
        assert data_of(out) in (old, new)
        answer(out)
        assert run(*arguments).returncode == 0  # the same command again
        assert data_of(out) == new
        assert answer(out) == wanted
        assert not list(tmp_path.glob(".out.onnx*"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed == 2 * len(new) - 1  # data is renamed twice (to its name, and into place), the model once


def test_leftovers_are_removed_when_surely_ours_and_dead(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    foreign = {".out.onnx.magr-foreign": {"file": "mine"}}
    foreign[".out.onnx.magr-locked"] = {"owner.lock": "locked by another program", "file": "mine"}
    foreign[".out.onnx.magr-lock"] = {"owner.lock": "locked by another program"}
    for folder, contents in foreign.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            (tmp_path / folder / name).write_text(text)
    with staging_directory(out) as living:
        remove_stale(out)
        assert living.is_dir()  # its lock is held
        mark = (living / "owner.lock").read_bytes()
    assert not living.exists()
    dead = tmp_path / ".out.onnx.magr-dead"
    dead.mkdir()
    (dead / "owner.lock").write_bytes(mark)
    (dead / "spool-0.data").write_bytes(b"much")
    other = tmp_path / ".other.onnx.magr-dead"
    other.mkdir()
    (other / "owner.lock").write_bytes(mark)
    magr_onnx.optimize(graphs.chain(), output=out)
    assert names(tmp_path) == sorted([".other.onnx.magr-dead", *foreign, "out.onnx"])
    for folder, contents in foreign.items():
        assert {p.name: p.read_text() for p in (tmp_path / folder).iterdir()} == contents


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    first = lock(tmp_path / "lock")
    assert first is not None
    assert lock(tmp_path / "lock") is None
    first.close()
    again = lock(tmp_path / "lock")
    assert again is not None
    again.close()


@contextlib.contextmanager
def small_disk(folder: Path, size: int, options: str = "") -> Iterator[Path]:
    """A file system of ``size`` bytes; skips where none can be mounted."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_loses_nothing(external: bool, tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as disk:
        out = disk / "out.onnx"
        save(scaled(1), out, layout=EXTERNAL)
        old = data_of(out)
        with pytest.raises(OutputError, match="the disk is full; free space there, or write to another disk"):
            magr_onnx.optimize(bundled.MODEL, output=out, external_data=external)
        assert data_of(out) == old
        assert names(disk) == sorted(old)
        answer(out)


def test_finished_layers_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as disk:
        out = disk / "out.onnx"
        with pytest.raises(OutputError, match=r"temporary files.*the disk is full"):
            magr_onnx.optimize(bundled.MODEL, output=out, max_memory="1MB")
        assert names(disk) == []


def test_temporary_files_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path, 64 << 10) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(OutputError, match=r"temporary files to .*disk.*set TMPDIR"):
            Session(ir.from_proto(onnx.load(bundled.MODEL)))
        with Cache(0) as cache, pytest.raises(OutputError, match=r"disk is full.*larger --cache, or set TMPDIR"):
            cache.put("x", 0, np.zeros(1 << 16))
        with Fisher() as moments, pytest.raises(OutputError, match=r"second moments of gradients to .*disk is full.*set TMPDIR"):
            moments.put("y", 0, np.zeros((256, 256)))
        assert names(disk) == []


def test_the_last_bytes_of_a_value_on_a_full_disk_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough that a buffer takes them in, of a file whose first page is written."""
    values = np.arange(1000, dtype=np.float32)
    with small_disk(tmp_path, 3 << 12) as disk:  # a value takes two pages
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with Cache(0) as cache:
            cache.put("x", 0, values)
            with pytest.raises(OutputError, match="disk is full"):
                cache.put("x", 1, values)
            np.testing.assert_array_equal(cache.get("x", 0), values)


def test_a_job_directory_on_a_full_disk_keeps_what_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as disk:
        with pytest.raises(OutputError, match=r"the disk is full.*The layers finished so far are kept"):
            magr_onnx.optimize(bundled.MODEL, output=tmp_path / "out.onnx", resume=disk / "job")
        kept = list((disk / "job" / "layers").iterdir())
        assert kept
        assert all(p.suffix == ".npz" for p in kept)
        subprocess.run(["mount", "-o", "remount,size=64M", disk], check=True)
        _, report = magr_onnx.optimize(bundled.MODEL, output=tmp_path / "out.onnx", resume=disk / "job")
        assert any(f"{len(kept)} layers were finished before" in note for note in report.notes)


def test_a_read_only_file_system_is_refused_before_work(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OutputError, match="is not writable"):
            magr_onnx.optimize(graphs.chain(), output=disk / "out.onnx")
        onnx.save(proto(graphs.chain()), tmp_path / "m.onnx")
        for option, beside in (("--report", "r.json"), ("--save-recipe", "r.toml")):
            result = run("optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), option, str(disk / beside))
            assert "is not writable" in " ".join(result.stderr.split())
            assert not (tmp_path / "o.onnx").exists()
        with pytest.raises(OutputError, match="read-only; write to another folder"):
            save(graphs.chain(), disk / "out.onnx")


def test_a_limit_on_file_sizes_is_explained(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="--shard-size"):
            save(graphs.chain(), out, layout=EXTERNAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"precious"
    assert names(tmp_path) == ["out.onnx"]


def test_a_protobuf_that_is_too_large_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PROTOBUF_LIMIT", 100)
    with pytest.raises(MagrError, match="a protobuf has 2 GiB at most"):
        save(graphs.chain(), tmp_path / "out.onnx")
    assert names(tmp_path) == []


def test_tensors_begin_where_kernels_and_pages_like_it(tmp_path: Path) -> None:
    b = graphs.Builder()
    x = b.input("x", ["batch", 4])
    y = b.node("Add", [x, b.constant("odd", np.ones((99, 4), np.float32)[:1])])
    for i, rows in enumerate((1001, 70_001, 33)):
        tall = b.constant(f"t{i}", np.full((rows, 4), i + 1, np.float32))
        y = b.node("Add", [y, b.node("ReduceMax", [tall], axes=[0], keepdims=1)])
    out = tmp_path / "out.onnx"
    model = b.model(y, ["batch", 4])
    model.graph.opset_imports[""] = 17
    save(model, out, layout=Layout(external=True))
    loaded = ir.load(out)
    places = {v.name: t for v in loaded.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)}
    assert {name: tensor.offset % (4096 if tensor.nbytes >= 1 << 20 else 64) for name, tensor in places.items()} == {
        "t0": 0,
        "t1": 0,
        "t2": 0,
    }
    with Session(out) as session:
        np.testing.assert_array_equal(session.run({"x": np.zeros((1, 4), np.float32)})[0], np.full((1, 4), 7, np.float32))


def test_data_that_another_model_reads_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    out, other = tmp_path / "out.onnx", tmp_path / "other.onnx"
    magr_onnx.optimize(bundled.MODEL, output=out, external_data=True, quantizer="rtn")
    expected = ir.load(out).graph.initializers
    weights = {name: v.const_value.numpy().copy() for name, v in expected.items() if v.const_value is not None}
    out.rename(other)
    for bits in (3, 8):  # the second time there is an old output too
        magr_onnx.optimize(bundled.MODEL, output=out, external_data=True, quantizer="rtn", bits=bits)
    out.with_name("copy.onnx").write_bytes(out.read_bytes())
    magr_onnx.optimize(bundled.MODEL, output=out, external_data=True, quantizer="rtn", bits=5)
    for path in (other, out, out.with_name("copy.onnx")):
        with Session(path):
            pass
    for name, value in ir.load(other).graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), weights[name])


def test_a_model_in_memory_keeps_its_data_file(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ir.save(ir.load(bundled.MODEL), out, external_data="out.onnx.data", size_threshold_bytes=0)
    given = ir.load(out)
    with pytest.raises(magr_onnx.OutputError, match="overwrite the input model or its data"):
        magr_onnx.optimize(given, output=out, external_data=True, quantizer="rtn")
    (tmp_path / "out.onnx.data").rename(tmp_path / "moved")
    with pytest.raises(magr_onnx.ModelError, match="no such file"):
        magr_onnx.optimize(ir.load(out), output=tmp_path / "q.onnx", quantizer="rtn")
