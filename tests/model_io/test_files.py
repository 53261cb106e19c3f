"""Bad models and bad outputs: a clear error, nothing left behind, no file lost."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import MagrError, ModelError, OutputError
from magr_onnx.model_io import files, writing
from magr_onnx.model_io.legacy import to_proto
from magr_onnx.model_io.writing import tensor_bytes
from tests import graphs
from tests.graphs import proto


def external(folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(proto(graphs.chain()), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def make_folder(folder: Path) -> Path:
    (folder / "exported").mkdir()
    return write(folder / "exported" / "a.onnx", b"").parent


def make_text(folder: Path) -> Path:
    return write(folder / "m.onnx", b"this is not a model, it is a sentence")


def make_empty(folder: Path) -> Path:
    return write(folder / "m.onnx", b"")


def make_truncated(folder: Path) -> Path:
    return write(folder / "m.onnx", proto(graphs.chain()).SerializeToString()[:-1000])


def make_zeros(folder: Path) -> Path:
    return write(folder / "m.onnx", b"\0" * 64)


def make_invalid(folder: Path) -> Path:
    model = ir.to_proto(graphs.chain())
    model.graph.node[0].input[0] = "nowhere"
    return write(folder / "m.onnx", model.SerializeToString())


def make_bad_attribute(folder: Path) -> Path:
    model = ir.to_proto(graphs.chain())
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("transQ", 1))
    return write(folder / "m.onnx", model.SerializeToString())


def make_missing_data(folder: Path) -> Path:
    path = external(folder)
    (folder / "weights.bin").unlink()
    return path


def make_short_data(folder: Path) -> Path:
    path = external(folder)
    (folder / "weights.bin").write_bytes(b"short")
    return path


def make_misplaced_data(folder: Path) -> Path:
    path = external(folder)
    (folder / "elsewhere").mkdir()
    return path.rename(folder / "elsewhere" / "model.onnx")


def make_escaping_data(folder: Path) -> Path:
    path = external(folder)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    return write(path, model.SerializeToString())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.onnx", "no such file"),
        (lambda folder: folder, "is a folder; give "),
        (make_text, "not an ONNX model"),
        (make_empty, "not an ONNX model"),
        (make_truncated, "truncated"),
        (make_zeros, "not an ONNX model"),
        (make_invalid, "not a valid ONNX model"),
        (make_bad_attribute, "not a valid ONNX model"),
        (make_missing_data, "weights.bin is missing"),
        (make_short_data, "has 5 bytes, but the tensor ends at"),
        (make_misplaced_data, "is missing; keep it beside the model"),
        (make_escaping_data, "lies outside"),
    ],
)
def test_bad_model_files(make: Any, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"precious")
    with pytest.raises(ModelError) as caught:
        magr_onnx.optimize(path, output=out)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert out.read_bytes() == b"precious"


def test_models_in_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"exported is a folder; give \S*exported/a.onnx$"):
        magr_onnx.inspect(make_folder(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match=r"none is a folder; give an \.onnx file"):
        magr_onnx.inspect(tmp_path / "none")


def test_every_missing_file_is_listed(tmp_path: Path) -> None:
    path = make_missing_data(tmp_path)
    with pytest.raises(ModelError) as caught:
        files.load(path)
    assert all(f"tensor {name}" in str(caught.value) for name in ("w1", "b1", "w2", "b2"))


def test_unreadable_objects_are_named() -> None:
    with pytest.raises(ModelError, match="from dict"):
        magr_onnx.optimize({})


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(external(tmp_path), output=out)
    assert report.verified == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx", "weights.bin"]
    assert report.bytes_before > (tmp_path / "weights.bin").stat().st_size


@pytest.mark.parametrize("kind", ["cache of a hub", "several names"])
def test_files_that_are_links_are_read_as_onnxruntime_reads_them(kind: str, tmp_path: Path) -> None:
    store, folder, link = tmp_path / "blobs", tmp_path / "snapshots" / "main", os.symlink if kind == "cache of a hub" else os.link
    store.mkdir()
    folder.mkdir(parents=True)
    original = external(store)
    for name, blob in (("m.onnx", original), ("weights.bin", store / "weights.bin")):
        named = blob.rename(store / f"{name}-sha256") if kind == "cache of a hub" else blob
        link(named, folder / name)
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(folder / "m.onnx", output=out)
    assert report.verified == 2
    assert magr_onnx.validate(folder / "m.onnx", out, [graphs.feeds(graphs.chain())]).arithmetics["default"]
    plain = tmp_path / "plain"
    plain.mkdir()
    magr_onnx.optimize(external(plain), output=plain / "out.onnx")
    assert (plain / "out.onnx").read_bytes() == out.read_bytes()


def test_caller_s_objects_stay_as_they_are() -> None:
    model = graphs.chain()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    magr_onnx.optimize(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    as_proto = proto(model)
    magr_onnx.optimize(as_proto, format="qdq")
    assert as_proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("suffix", "said"), [(".pt", "magr_onnx.torch.optimize"), (".safetensors", "weights without"), (".npz", "--calib")]
)
def test_files_that_are_known_to_be_no_models(suffix: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no ONNX model, by its name: .*{said}"):
        magr_onnx.optimize(write(tmp_path / f"model{suffix}", b"PK"))


def test_bad_outputs(tmp_path: Path) -> None:
    path = external(tmp_path)
    content = path.read_bytes()
    cases = [
        (path, "would overwrite the input"),
        (tmp_path / "weights.bin", "would overwrite the input|weights.bin: the result is an ONNX model"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.onnx", "does not exist; create it first"),
        (tmp_path / "out.txt", "out.txt: the result is an ONNX model; give a name that ends in .onnx"),
    ]
    (tmp_path / "link.onnx").symlink_to(path)
    cases.append((tmp_path / "link.onnx", "would overwrite the input"))
    for out, message in cases:
        with pytest.raises(OutputError, match=message):
            magr_onnx.optimize(path, output=out)
    assert path.read_bytes() == content


def test_paths_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    model, odd = write(tmp_path / "m.onnx", proto(graphs.chain()).SerializeToString()), os.fsdecode(b"m\xff.onnx")
    try:
        (tmp_path / odd).write_bytes(model.read_bytes())
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(ModelError, match=r"m\\udcff.onnx' is not UTF-8.*rename"):
        magr_onnx.inspect(tmp_path / odd)
    with pytest.raises(OutputError, match=r"o\\udcff.onnx' is not UTF-8.*rename"):
        magr_onnx.optimize(model, output=tmp_path / os.fsdecode(b"o\xff.onnx"))
    with pytest.raises(OutputError, match=r"o\\udcff' is not UTF-8.*rename"):
        magr_onnx.optimize_folder(tmp_path, output=tmp_path.parent / os.fsdecode(b"o\xff"))


def test_standard_output_is_no_place_for_a_model() -> None:
    with pytest.raises(OutputError, match=r"give a name that ends in .onnx"):
        magr_onnx.optimize(graphs.chain(), output="-")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="not writable"):
        magr_onnx.optimize(external(tmp_path), output=folder / "out.onnx")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), MagrError("verification")])
def test_a_failed_write_keeps_the_old_file(failure: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"precious")

    def verify(path: Path) -> None:
        assert path.is_file()  # written in full, under another name
        raise failure

    with pytest.raises((KeyboardInterrupt, MagrError)):
        writing.save(graphs.chain(), out, verify)
    assert out.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_sizes_of_models_in_memory_are_those_of_their_files(tmp_path: Path) -> None:
    model = graphs.chain()
    out = tmp_path / "in.onnx"
    out.write_bytes(to_proto(model).SerializeToString())
    assert files.model_bytes(model) == pytest.approx(out.stat().st_size, abs=100)
    assert tensor_bytes(model) < files.model_bytes(model)
    result, report = magr_onnx.optimize(model)
    written = len(to_proto(result).SerializeToString())
    assert report.bytes_before == pytest.approx(out.stat().st_size, abs=100)
    assert report.bytes_after == pytest.approx(written, abs=100)
    assert model.graph.initializers.keys() == ir.load(out).graph.initializers.keys()
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def test_large_models_go_to_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "INLINE_LIMIT", 100)
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(graphs.chain(), output=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    loaded = files.load(out)
    assert report.bytes_after == loaded.bytes
    assert len(magr_onnx.passes.emit.readback.read_weights(loaded.model)) == 2
    with pytest.raises(OutputError, match="would overwrite"):
        magr_onnx.optimize(out, output=tmp_path / "out.onnx")


def test_weights_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    model = graphs.chain()
    for name in ("w1", "w2"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        array = tensor.numpy().copy()
        array[0, 1] = np.inf
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    with pytest.raises(magr_onnx.NonFiniteError) as caught:
        magr_onnx.optimize(model, output=tmp_path / "out.onnx")
    assert "weight of up" in str(caught.value)
    assert "weight of down" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_with_nothing_to_convert_is_refused() -> None:
    b = graphs.Builder()
    x = b.input("x", ["batch", 4])
    with pytest.raises(ModelError, match="no MatMul, Gemm or convolution"):
        magr_onnx.optimize(b.model(b.node("Relu", [x]), ["batch", 4]))


def test_provider_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(magr_onnx.ProviderError, match="CPUExecutionProvider"):
        magr_onnx.optimize(graphs.chain(), provider="TensorrtExecutionProvider")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="special files are a thing of POSIX")
def test_special_files_are_no_outputs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.onnx").symlink_to("pipe")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound, contextlib.chdir(tmp_path):
        bound.bind("bound.onnx")
    _, report = magr_onnx.optimize(graphs.chain())
    for name, kind in (("pipe", "a named pipe"), ("link.onnx", "a named pipe"), ("bound.onnx", "a socket")):
        with pytest.raises(OutputError, match=f"output .*{name} is {kind}.*choose another name"):
            magr_onnx.optimize(graphs.chain(), output=tmp_path / name)
    for suffix, save in ((".json", report.save), (".toml", magr_onnx.Recipe.from_dict({"bits": 3}).save)):
        (tmp_path / f"link{suffix}").symlink_to("pipe")
        with pytest.raises(OutputError, match=f"link{suffix} is a named pipe.*choose another name"):
            save(tmp_path / f"link{suffix}")
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "m.onnx", proto(graphs.chain()).SerializeToString())
    with pytest.raises(OutputError, match=r"output .*pipe is a named pipe"):
        magr_onnx.optimize_folder(tmp_path / "source", output=tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "bound.onnx").is_socket()
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "bound.onnx", "source", "link.onnx", "link.json", "link.toml"}


def test_a_device_stays_one(tmp_path: Path) -> None:
    device = tmp_path / "device.onnx"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except (AttributeError, OSError):
        pytest.skip("only root makes devices")
    with pytest.raises(OutputError, match="is a device"):
        magr_onnx.optimize(graphs.chain(), output=device)
    assert device.is_char_device()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_replaced_leaves_its_permissions(tmp_path: Path) -> None:
    out, recipe = tmp_path / "out.onnx", magr_onnx.Recipe.from_dict({"bits": 3})
    with_report = [out, tmp_path / "r.json", tmp_path / "r.toml"]

    def run(**options: Any) -> None:
        magr_onnx.optimize(graphs.chain(), output=out, **options).report.save(with_report[1])
        recipe.save(with_report[2])

    mask = os.umask(0o022)
    try:
        run()
        assert [mode(path) for path in with_report] == [0o644] * 3
        for path, asked in zip(with_report, (0o600, 0o640, 0o660), strict=True):
            path.chmod(asked)
        run(external_data=True)
    finally:
        os.umask(mask)
    assert [mode(path) for path in with_report] == [0o600, 0o640, 0o660]
    assert mode(tmp_path / "out.onnx.data") == 0o600  # beside a model that had none


def test_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"data files.* 255 bytes.*shorter name"):
        magr_onnx.optimize(graphs.chain(), output=tmp_path / ("o" * 240 + ".onnx"))
    with pytest.raises(OutputError, match=r"255 bytes.*shorter name"):
        magr_onnx.optimize(graphs.chain(), output=tmp_path / ("o" * 300 + ".onnx"))
    long = tmp_path / ("ö" * 105 + ".onnx")
    magr_onnx.optimize(graphs.chain(), output=long, external_data=True)
    magr_onnx.optimize(graphs.chain(), output=long, external_data=True, bits=3)
    assert len(list(tmp_path.iterdir())) == 2


def outlying() -> ir.Model:
    """Two layers with a GELU between them behind a norm: every rewrite changes some of it, and makes the model larger."""
    b = graphs.Builder()
    x = b.input("x", ["batch", 64])
    scale, shift = b.constant("scale", np.ones(64, np.float32)), b.constant("shift", np.zeros(64, np.float32))
    first = graphs.random(64, 64)
    first[:2] *= 40
    hidden = b.node("MatMul", [b.node("LayerNormalization", [x, scale, shift], "norm"), b.constant("w1", first)], "up")
    return b.model(b.node("MatMul", [b.node("Gelu", [hidden], "gelu"), b.constant("w2", graphs.random(64, 64))], "down"), ["batch", 64])


@pytest.mark.parametrize("options", [{"format": "qdq-int8", "twin_ranges": True}, {"split_outliers": True}, {"equalize": True}])
@pytest.mark.parametrize("in_memory", [lambda model: model, graphs.proto])
def test_the_size_before_is_that_of_the_model_as_it_was_given(in_memory: Any, options: dict[str, Any], tmp_path: Path) -> None:
    source = outlying()
    (path := tmp_path / "source.onnx").write_bytes(to_proto(source).SerializeToString())
    report = magr_onnx.optimize(in_memory(source), [{"x": graphs.correlated(64, 64)}], effort="fast", progress=False, **options).report
    assert report.bytes_before == pytest.approx(path.stat().st_size, abs=100)
