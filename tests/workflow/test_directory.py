"""Folders of models: what is optimized, what is carried along, what appears and what does not."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tokenizers import Tokenizer as Tool
from tokenizers import models, pre_tokenizers, processors

import magr_onnx
from magr_onnx import CalibrationError, ModelError, OptionError, OutputError, optimize_folder
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.runtime.data import text
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.data.tokenizer import Tokenizer
from magr_onnx.runtime.ort.session import InputInfo
from magr_onnx.workflow.directory import check_reports, taken_by
from tests import graphs
from tests.decoders import genai
from tests.decoders import optimum as decoder
from tests.graphs import Builder, proto, random
from tests.helpers import ROOT, run_program
from tests.model_io.test_writing import small_disk

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]]
INT64 = ir.DataType.INT64


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tool(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "model_max_length": 8}))


def encoder(length: int | str = "length") -> ir.Model:
    """Tokens, their embeddings, two layers; the mask counts."""
    b = Builder()
    ids, mask = (b.input(name, ["batch", length], INT64) for name in ("input_ids", "attention_mask"))
    x = b.node("Gather", [b.constant("table", random(len(WORDS), 32)), ids])
    x.dtype = ir.DataType.FLOAT
    hidden = b.node("Relu", [b.node("MatMul", [x, b.constant("w1", random(32, 48, seed=1))], "up")])
    y = b.node("MatMul", [hidden, b.constant("w2", random(48, 32, seed=2))], "down")
    kept = b.node("Cast", [b.node("Unsqueeze", [mask, b.constant("axis", np.array([2]))])], to=int(ir.DataType.FLOAT))
    kept.dtype = ir.DataType.FLOAT
    return b.model(b.node("Mul", [y, kept]), ["batch", length, 32], "last_hidden_state")


def save(model: ir.Model, path: Path, external: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto(model), str(path), save_as_external_data=external is not None, location=external, size_threshold=256)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """One model with its data beside it, and what transformers reads."""
    folder = tmp_path / "exported"
    save(encoder(), folder / "model.onnx", "model.onnx_data")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type":  "bert"}\n')
    (folder / "onnx").mkdir()
    (folder / "onnx" / "notes.bin").write_bytes(bytes(range(256)))
    (tmp_path / "texts.txt").write_text("one two three\n\nfour five\nsix seven eight nine ten one two three four\n" * 8)
    return folder


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two models that share a data file with one another, in folders of their own kind."""
    folder = tmp_path / "several"
    save(graphs.matmul(), folder / "encoder_model.onnx", "encoder_model.onnx_data")
    save(graphs.chain(), folder / "decoder_model.onnx")
    (folder / "config.json").write_text("{}")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(path: Path, **feed: Any) -> Any:
    return onnxruntime.InferenceSession(str(path)).run(None, feed)[0]


def test_all_else_is_carried_along(exported: Path, tmp_path: Path) -> None:
    before = tree(exported)
    made = optimize_folder(exported, tmp_path / "texts.txt", output=tmp_path / "out")
    after = tree(tmp_path / "out")
    assert tree(exported) == before
    assert sorted(made.carried) == ["config.json", "onnx/notes.bin", "tokenizer.json", "tokenizer_config.json"]
    assert {name: after[name] for name in made.carried} == {name: before[name] for name in made.carried}
    assert after.keys() == {"model.onnx", *made.carried}
    report = made.reports["model.onnx"]
    assert (len(report.layers), report.verified) == (2, 2)
    assert report.output == str(tmp_path / "out" / "model.onnx")
    assert "texts.txt: " in report.calibration


def test_the_result_loads_and_is_close(exported: Path, tmp_path: Path) -> None:
    optimize_folder(exported, tmp_path / "texts.txt", output=tmp_path / "out", external_data=True)
    assert (tmp_path / "out" / "model.onnx.data").is_file()
    feed = {"input_ids": np.array([[2, 4, 9, 13, 3]]), "attention_mask": np.ones((1, 5), np.int64)}
    wanted, found = (run(f / "model.onnx", **feed) for f in (exported, tmp_path / "out"))
    assert 0 < np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)


def test_every_model_has_its_data(several: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "decoder_model").mkdir(parents=True)
    np.savez(data / "encoder_model.npz", **graphs.feeds(graphs.matmul()))  # type: ignore[arg-type]
    np.savez(data / "decoder_model" / "0.npz", **graphs.feeds(graphs.chain()))  # type: ignore[arg-type]
    made = optimize_folder(several, data, output=tmp_path / "out", resume=tmp_path / "job")
    assert made.reports.keys() == {"encoder_model.onnx", "decoder_model.onnx"}
    assert "encoder_model.npz" in made.reports["encoder_model.onnx"].calibration
    assert str(data / "decoder_model") in made.reports["decoder_model.onnx"].calibration
    named = {"encoder_model": graphs.feeds(graphs.matmul()), "decoder_model.onnx": None}
    again = optimize_folder(several, {k: v and [v] for k, v in named.items()}, output=tmp_path / "again")
    assert again.reports["encoder_model.onnx"].calibration.startswith("the given batches")
    assert "data-free" in again.reports["decoder_model.onnx"].calibration


def test_models_not_asked_for_stay_as_they_are(several: Path, tmp_path: Path) -> None:
    made = optimize_folder(several, output=tmp_path / "out", models=["decoder*"])
    before, after = tree(several), tree(tmp_path / "out")
    assert list(made.reports) == ["decoder_model.onnx"]
    for name in ("encoder_model.onnx", "encoder_model.onnx_data", "config.json"):
        assert after[name] == before[name]


def test_data_that_another_model_reads_is_kept(several: Path, tmp_path: Path) -> None:
    (several / "copy.onnx").write_bytes((several / "encoder_model.onnx").read_bytes())
    optimize_folder(several, output=tmp_path / "out", models=["encoder_model"])
    x = graphs.feeds(graphs.matmul())
    np.testing.assert_array_equal(run(tmp_path / "out" / "copy.onnx", **x), run(several / "copy.onnx", **x))


def test_a_decoder_with_a_cache_reads_text(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    save(decoder(), folder / "model.onnx")
    write_tokenizer(folder)
    (tmp_path / "texts.txt").write_text("one two three four\nfive six seven eight\n" * 16)
    made = optimize_folder(folder, tmp_path / "texts.txt", output=tmp_path / "out")
    assert any("decode" in note for note in made.reports["model.onnx"].notes)


def test_a_genai_folder_keeps_the_names_its_configuration_has(tmp_path: Path) -> None:
    folder, out = tmp_path / "genai", tmp_path / "out"
    save(genai(), folder / "model.onnx", "model.onnx.data")
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    old = (folder / "model.onnx.data").read_bytes()
    optimize_folder(folder, output=out, external_data=True, format="matmulnbits")
    assert tree(out).keys() == tree(folder).keys() == {"model.onnx", "model.onnx.data", "genai_config.json"}
    assert len(tree(out)["model.onnx.data"]) < len(old) / 2
    assert (folder / "model.onnx.data").read_bytes() == old
    onnxruntime.InferenceSession(str(out / "model.onnx"))


@pytest.mark.parametrize("damage", ["truncated", "misfit"])
def test_a_run_that_fails_leaves_nothing(several: Path, tmp_path: Path, damage: str) -> None:
    data: Any = None
    if damage == "truncated":
        path = several / "decoder_model.onnx"
        path.write_bytes(path.read_bytes()[:100])
    else:
        data = {"encoder_model": [graphs.feeds(graphs.matmul())], "decoder_model": [{"x": np.ones((4, 3), np.float32)}]}
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(ModelError if damage == "truncated" else CalibrationError):
        optimize_folder(several, data, output=tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == before


def test_what_is_wrong_with_one_model_is_known_before_any_work(several: Path, tmp_path: Path) -> None:
    """One of the models has no data, which its ranges need: the other is not quantized in vain."""
    finished: list[str] = []
    for first, second in (("encoder_model", "decoder_model"), ("decoder_model", "encoder_model")):
        model = graphs.matmul() if first == "encoder_model" else graphs.chain()
        data = {first: [graphs.feeds(model)], second: None}
        with pytest.raises(OptionError, match="static 8-bit activations need calibration data"):
            optimize_folder(
                several, data, output=tmp_path / "out", format="qdq-int8", on_layer=lambda row: finished.append(row.name), progress=None
            )
    assert finished == []
    assert not (tmp_path / "out").exists()


def test_errors_of_callbacks_and_data_are_not_about_the_output(several: Path, tmp_path: Path) -> None:
    """A caller's own OSError comes back as it is, as from a single model."""

    def full(*_: Any) -> None:
        raise OSError(28, "my log is full")

    class Source:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield graphs.feeds(graphs.matmul())
            raise OSError(5, "my data is gone")

    before = {p.name for p in tmp_path.iterdir()}
    for options in ({"on_layer": full}, {"progress": full}):
        with pytest.raises(OSError, match="my log is full"):
            optimize_folder(several, output=tmp_path / "out", **options)
    with pytest.raises(OSError, match="my data is gone"):
        optimize_folder(several, {"encoder_model": Source(), "decoder_model": None}, output=tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == before


def test_an_earlier_result_stays_unless_asked(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    optimize_folder(several, output=out, bits=8)
    (out / "mine.txt").write_text("mine")
    before = tree(out)
    with pytest.raises(OutputError, match="not empty"):
        optimize_folder(several, output=out)
    assert tree(out) == before
    assert optimize_folder(several, output=out, bits=4, overwrite=True).kept == ("mine.txt",)
    after = tree(out)
    assert after["mine.txt"] == b"mine"
    assert len(after["decoder_model.onnx"]) < len(before["decoder_model.onnx"])
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="no earlier result"):
        optimize_folder(several, output=other, overwrite=True)
    assert tree(other) == {"letter.txt": b"dear"}
    assert {p.name for p in tmp_path.iterdir()} == {"several", "out", "home"}


def test_what_links_lead_to_is_carried_along(several: Path, tmp_path: Path) -> None:
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "words.txt").write_text("a b")
    save(graphs.matmul(), tmp_path / "outside" / "inner.onnx")
    (several / "vocabulary").symlink_to("../outside")
    (several / "again").symlink_to("vocabulary")
    (several / "config2.json").symlink_to("config.json")
    made = optimize_folder(several, output=tmp_path / "out", models=["vocabulary/*"])
    assert made.reports.keys() == {"vocabulary/inner.onnx"}
    after, before = tree(tmp_path / "out"), tree(several)
    assert after["vocabulary/deep/words.txt"] == after["again/deep/words.txt"] == b"a b"
    assert after["again/inner.onnx"] == (tmp_path / "outside" / "inner.onnx").read_bytes() != after["vocabulary/inner.onnx"]
    assert {"config2.json", "encoder_model.onnx_data"} <= set(made.carried)
    assert before.items() <= after.items()


def test_links_that_cannot_be_followed_are_named(several: Path, tmp_path: Path) -> None:
    (several / "deep").mkdir()
    (several / "deep" / "up").symlink_to("..")
    (several / "gone.json").symlink_to("nowhere.json")
    with pytest.raises(ModelError, match=r"up is a link to a folder it is in") as told:
        optimize_folder(several, output=tmp_path / "out")
    assert "gone.json is a link to nowhere.json, where there is no file" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_link_given_as_output_stays_one(several: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for overwrite in (False, True):
        made = optimize_folder(several, output=tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk").keys() == {"encoder_model.onnx", "decoder_model.onnx", "config.json"}
    assert made.reports["encoder_model.onnx"].output == str(tmp_path / "out" / "encoder_model.onnx")


def test_options_are_checked_before_anything_is_copied(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = optimize_folder(several, output=out, bits=4, batch_size=8)
    command = made.reports["encoder_model.onnx"].command
    assert command == f"magr_onnx.optimize_folder(folder={str(several)!r}, output={str(out)!r}, bits=4, batch_size=8)"
    (out / "words").write_text("a file of the user's, to be kept where the source has a folder")
    (several / "words").mkdir()
    (several / "words" / "list.txt").write_text("a b")
    before = tree(out)
    with pytest.raises(OptionError, match="bits"):
        optimize_folder(several, output=out, bits=99, overwrite=True)
    with pytest.raises(OutputError, match=r"words"):  # found in copying
        optimize_folder(several, output=out, bits=4, overwrite=True)
    assert tree(out) == before


def test_reports_are_no_files_of_the_run(several: Path, tmp_path: Path) -> None:
    a, out = tmp_path / "r.json", tmp_path / "out"
    check_reports(several, [], [a], {several, out})
    with pytest.raises(OutputError, match=r"two reports would be .*r.encoder_model.json"):
        check_reports(several, [], [a, tmp_path / "r.encoder_model.json"], {several, out})
    with pytest.raises(OutputError, match=r"r.encoder_model.json would overwrite"):
        check_reports(several, [], [a], {tmp_path / "r.encoder_model.json"})
    with pytest.raises(OutputError, match=r"config.json would overwrite"):
        check_reports(several, [], [several / "config.json"], taken_by(several, out))
    assert not a.exists()


def test_overwriting_fails_without_a_loss(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    optimize_folder(several, output=out)
    before = tree(out)
    data = {"encoder_model": None, "decoder_model": [{"x": np.full((4, 48), np.inf, np.float32)}]}
    with pytest.raises(CalibrationError, match="infinite"):
        optimize_folder(several, data, output=out, overwrite=True)
    assert tree(out) == before


@pytest.mark.parametrize("out", ["several", "several/inside", "."])
def test_source_and_output_are_apart(several: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(OutputError, match="each other"):
        optimize_folder(several, output=tmp_path / out)


def test_errors_say_what_each_model_lacks(several: Path, exported: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **graphs.feeds(graphs.matmul()))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"one model for 2: decoder_model.onnx, encoder_model.onnx; .*--models"):
        optimize_folder(several, tmp_path / "inputs.npz", output=tmp_path / "out")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "encoder_model.npz", **graphs.feeds(graphs.matmul()))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"no decoder_model.npz, decoder_model.txt, decoder_model.jsonl or folder decoder_model"):
        optimize_folder(several, tmp_path / "data", output=tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"'model', and no such model") as told:
        optimize_folder(several, {"model": None}, output=tmp_path / "out")
    assert "no calibration data for decoder_model.onnx" in str(told.value)
    with pytest.raises(CalibrationError) as told:
        optimize_folder(several, tmp_path / "texts.txt", output=tmp_path / "out")
    assert str(told.value).count("there is no tokenizer.json") == 2
    with pytest.raises(ModelError, match=r"no model matches 'vae'; there are model.onnx"):
        optimize_folder(exported, output=tmp_path / "out", models=["vae"])


IDS, MASK, TYPES = (InputInfo(name, np.dtype(np.int64), (None, None)) for name in ("input_ids", "attention_mask", "token_type_ids"))


def encode(texts: Path, folder: Path, inputs: Sequence[InputInfo], **reading: int) -> Batches:
    return text.encode(texts, Tokenizer.open(folder), inputs, 16, text.Reading(**reading))


def test_texts_become_batches(exported: Path, tmp_path: Path) -> None:
    """Against transformers' rules, by hand: special tokens around, cut at the model's 8, padded on the right to the longest."""
    batches = list(encode(tmp_path / "texts.txt", exported, (IDS, MASK, TYPES)))
    assert [b["input_ids"].shape for b in batches] == [(6, 4), (6, 5), (6, 8), (6, 8)]  # a fourth of 24 lines, sorted by length
    np.testing.assert_array_equal(batches[1]["input_ids"][0], [2, 7, 8, 3, 0])
    np.testing.assert_array_equal(batches[1]["attention_mask"][0], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(batches[3]["input_ids"][0], [2, 9, 10, 11, 12, 13, 4, 3])
    assert not any(b["token_type_ids"].any() for b in batches)


def test_texts_fit_what_the_model_fixes(exported: Path, tmp_path: Path) -> None:
    fixed = [InputInfo(name, np.dtype(np.int32), (5, 6)) for name in ("input_ids", "attention_mask")]
    encoded = encode(tmp_path / "texts.txt", exported, fixed)
    batches = list(encoded)
    assert [b["input_ids"].shape for b in batches] == [(5, 6)] * 8
    assert encoded.weights == (0.2,) * 4 + (1,) * 4  # 24 lines: four of them alone, five times each
    for batch in batches[:4]:
        assert (batch["input_ids"] == batch["input_ids"][0]).all()
    assert "4 of 24 were repeated to fill batches" in encoded.notes[0]
    assert batches[0]["input_ids"].dtype == np.int32
    alone = list(encode(tmp_path / "texts.txt", exported, [IDS]))
    assert {b["input_ids"].shape[0] for b in alone} == {1}
    assert all((b["input_ids"] != 0).all() for b in alone)


def test_lines_end_in_line_feeds_only(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("one\u2028two\x0bthree\rfour\r\nfive six\n".encode())
    batches = list(encode(tmp_path / "lines.txt", exported, [IDS, MASK]))
    assert [b["input_ids"].tolist() for b in batches] == [[[2, 8, 9, 3]], [[2, 4, 5, 6, 7, 3]]]


@pytest.mark.parametrize(
    "config",
    [
        '{"model_max_length": Infinity}',
        '{"model_max_length": NaN}',
        '{"model_max_length": true}',
        '{"pad_token": 5}',
        '{"pad_token": {}}',
    ],
)
def test_odd_tokenizer_configurations_change_nothing(exported: Path, tmp_path: Path, config: str) -> None:
    (exported / "tokenizer_config.json").write_text(config)
    (exported / "tokenizer.json").write_text(json.dumps({**json.loads((exported / "tokenizer.json").read_text()), "post_processor": None}))
    batches = list(encode(tmp_path / "texts.txt", exported, [IDS, MASK]))
    assert [b["input_ids"].shape for b in batches] == [(6, 2), (6, 3), (6, 9), (6, 9)]


def test_texts_that_cannot_be_read_are_explained(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"empty.txt: no text in it"):
        encode(tmp_path / "empty.txt", exported, [IDS, MASK])
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    few = encode(tmp_path / "few.txt", exported, [InputInfo("input_ids", np.dtype(np.int64), (5, None)), MASK])
    assert [b["input_ids"].shape[0] for b in few] == [5, 5]
    with pytest.raises(CalibrationError, match="UTF-8"):
        encode(tmp_path / "latin.txt", exported, [IDS, MASK])
    (exported / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match="not a tokenizer that"):
        encode(tmp_path / "texts.txt", exported, [IDS, MASK])


@pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="optimum-onnx is not installed")
def test_folders_of_optimum_load_in_optimum(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    found = run_program("optimum_export", "check", tmp_path, environment=environment)
    one, many = found["classifier"], found["translator"]
    assert 0 < one["difference"] < 0.1
    before, after = tree(Path(one["source"])), tree(Path(one["out"]))
    assert after.keys() == before.keys() >= {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all(after[name] == before[name] for name in after.keys() - {"model.onnx"})
    assert json.loads(Path(one["report"]).read_text())["verified"] == 14
    assert many["tokens"] == 6
    names = {"encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"}
    assert names <= tree(Path(many["out"])).keys() == tree(Path(many["source"])).keys()
    assert json.loads(Path(many["report"]).read_text())["models"].keys() == names
    assert len(json.loads((tmp_path / "several.encoder_model.json").read_text())["layers"]) > 0


def test_a_recipe_is_the_folders(several: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "encoder_model.npz", **graphs.feeds(graphs.matmul()))  # type: ignore[arg-type]
    np.savez(data / "decoder_model.npz", **graphs.feeds(graphs.chain()))  # type: ignore[arg-type]
    (tmp_path / "r.toml").write_text(
        'version = 1\nmodel = "several"\ncalibration = "data"\noutput = "out"\nresume = "job"\nbatch_size = 8\neffort = "fast"\nbits = 3\n'
    )
    made = optimize_folder(recipe=tmp_path / "r.toml")
    assert {name: report.calibration.split(":")[0] for name, report in made.reports.items()} == {
        name: str(data / name.replace(".onnx", ".npz")) for name in ("decoder_model.onnx", "encoder_model.onnx")
    }
    assert {row.bits for report in made.reports.values() for row in report.layers} == {3}
    assert {p.name for p in (tmp_path / "job").iterdir()} == {"decoder_model", "encoder_model"}
    assert {report.command for report in made.reports.values()} == {f"magr_onnx.optimize_folder(recipe={str(tmp_path / 'r.toml')!r})"}
    made = optimize_folder(recipe={"model": str(several), "models": "decoder*", "bits": 5}, output=tmp_path / "one", preset="web")
    assert {name: {row.bits for row in report.layers} for name, report in made.reports.items()} == {"decoder_model.onnx": {5}}
    with pytest.raises(OptionError, match="batch_size = 'a': expected a whole number, found a text"):
        optimize_folder(several, output=tmp_path / "two", batch_size="a")
    with pytest.raises(OptionError, match="give a folder of models and an output"):
        optimize_folder(several)


def test_patterns_are_looked_for_in_all_models_before_any_work(several: Path, tmp_path: Path) -> None:
    """``down`` is in the decoder only."""
    names = {
        name: [row.name for row in optimize_folder(several, output=tmp_path / "all").reports[name].layers]
        for name in ("decoder_model.onnx",)
    }
    assert "down" in names["decoder_model.onnx"]
    tables = [{"match": ["down", "*"], "bits": 8}, {"match": "down", "block_size": 64}]
    made = optimize_folder(several, output=tmp_path / "out", layers=tables, exclude=["up"], bits=3)
    found = {name: {row.name: (row.bits, row.block_size) for row in report.layers} for name, report in made.reports.items()}
    assert found["decoder_model.onnx"] == {"down": (8, 64)}
    assert {bits for bits, _ in found["encoder_model.onnx"].values()} == {8}
    job = tmp_path / "job"
    with pytest.raises(OptionError) as error:
        optimize_folder(
            several,
            output=tmp_path / "bad",
            resume=job,
            layers=[{"match": ["nowhere", "down"], "bits": 8}],
            exclude=["none*"],
            include=["down"],
        )
    assert "layer options: 'nowhere' matches no layer that is converted" in str(error.value)
    assert "exclude 'none*' matches no layer" in str(error.value)
    assert "encoder_model.onnx has no layer that include down matches; leave it out (models, --models)" in str(error.value)
    assert not job.exists()


def test_the_call_in_a_report_says_what_won_over_a_recipe(several: Path, tmp_path: Path) -> None:
    recipe = {"calibration": "no such folder", "models": "decoder*", "effort": "fast", "bits": 8}
    given: dict[str, Any] = {"recipe": recipe, "preset": None, "max_memory": None, "shard_size": None, "bits": None}
    result = optimize_folder(several, None, output=tmp_path / "o", **given)
    (report,) = result.reports.values()
    assert report.calibration == "none (data-free)"
    assert "calibration=None" in report.command
    assert "bits=None" in report.command
    written = tree(tmp_path / "o")
    again = eval(report.command.replace(str(tmp_path / "o"), str(tmp_path / "p")), {"magr_onnx": magr_onnx})
    assert tree(tmp_path / "p") == written
    assert [row.bits for one in again.reports.values() for row in one.layers] == [row.bits for row in report.layers]


def test_what_is_written_into_the_output_during_the_run_stays(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    optimize_folder(several, output=out)
    for name in ("log.txt", "gone.txt"):
        (out / name).write_text("before")
    (out / "turned").write_text("a file first")

    def meanwhile(row: LayerRow) -> None:
        (out / "log.txt").write_text(f"during {row.name}")
        (out / "new").mkdir(exist_ok=True)
        (out / "new" / "file").write_text("new")
        (out / "gone.txt").unlink(missing_ok=True)
        if (out / "turned").is_file():
            (out / "turned").unlink()
            (out / "turned").mkdir()

    made = optimize_folder(several, output=out, overwrite=True, bits=3, on_layer=meanwhile)
    after = tree(out)
    assert after["log.txt"].startswith(b"during ")
    assert after["new/file"] == b"new"
    assert "gone.txt" not in after
    assert list((out / "turned").iterdir()) == []
    assert made.kept == ("log.txt", "new/file")
    assert {row.bits for report in made.reports.values() for row in report.layers} == {3}


def test_what_is_kept_stays_what_it_was(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    optimize_folder(several, output=out)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "data.bin").write_bytes(bytes(1000))
    (out / "big").symlink_to("../big")
    (out / "note.txt").symlink_to("config.json")
    (out / "dangling").symlink_to("nowhere")
    (out / "empty" / "deep").mkdir(parents=True)
    made = optimize_folder(several, output=out, overwrite=True)
    assert {name: os.readlink(out / name) for name in ("big", "note.txt", "dangling")} == {
        "big": "../big",
        "note.txt": "config.json",
        "dangling": "nowhere",
    }
    assert (out / "empty" / "deep").is_dir()
    assert made.kept == ("big", "dangling", "note.txt")
    (several / "big").mkdir()
    (several / "big" / "words.txt").write_text("a b")
    with pytest.raises(OutputError, match=r"out: big is in the way of big/words.txt; rename or remove it"):
        optimize_folder(several, output=out, overwrite=True)
    assert os.readlink(out / "big") == "../big"


def test_a_folder_that_is_replaced_leaves_its_permissions(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (several / "deep").mkdir()
    (several / "deep" / "words.txt").write_text("a b")
    optimize_folder(several, output=out)
    (out / "mine").mkdir(mode=0o750)
    (out / "mine" / "key").write_text("secret")
    asked = {".": 0o700, "deep": 0o710, "deep/words.txt": 0o640, "mine": 0o750, "mine/key": 0o400, "encoder_model.onnx": 0o600}
    for name, mode in asked.items():
        (out / name).chmod(mode)
    optimize_folder(several, output=out, overwrite=True, external_data=True)
    assert {name: (out / name).stat().st_mode & 0o7777 for name in asked} == asked
    assert (out / "encoder_model.onnx.data").stat().st_mode & 0o7777 == 0o600


def test_job_directories_are_apart(tmp_path: Path) -> None:
    folder, job = tmp_path / "nested", tmp_path / "job"
    for name in ("enc.onnx", "enc/x.onnx", "enc.x.onnx"):
        save(graphs.matmul(), folder / name)
    for out in ("a", "b"):
        made = optimize_folder(folder, output=tmp_path / out, resume=job)
    assert {path.name for path in job.iterdir()} == {"enc", "enc.x", "enc.x.2"}
    assert all(any("taken from the job directory" in note for note in report.notes) for report in made.reports.values())


def test_names_too_long_for_a_result_are_known_before_any_work(several: Path, tmp_path: Path) -> None:
    (several / "encoder_model.onnx").rename(several / ("e" * 230 + ".onnx"))
    with pytest.raises(OutputError, match=r"out/e+.onnx, data files: .* 255 bytes; give a shorter name"):
        optimize_folder(several, output=tmp_path / "out", resume=tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_mount_point_is_no_output(several: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 22) as disk:
        with pytest.raises(OutputError, match=r"output .*disk is a mount point.*give a folder in it, such as .*disk/optimized"):
            optimize_folder(several, output=disk)
        optimize_folder(several, output=disk / "several")
        assert {path.name for path in disk.iterdir()} == {"several"}


def test_reports_that_can_be_written_are(several: Path, tmp_path: Path) -> None:
    made = optimize_folder(several, output=tmp_path / "out")
    (tmp_path / "r.decoder_model.json").mkdir()
    with pytest.raises(OutputError, match=r"r.decoder_model.json would overwrite a folder"):
        made.save(tmp_path / "r.json")
    assert {path.name for path in tmp_path.glob("r.*") if path.is_file()} == {"r.json", "r.encoder_model.json"}


def test_a_name_is_no_pattern_where_a_model_has_it(tmp_path: Path) -> None:
    for name in ("a[1].onnx", "a1.onnx"):
        save(graphs.matmul(), tmp_path / "source" / name)
    for out, patterns, wanted in (
        ("one", ["a[1].onnx"], ["a[1].onnx"]),
        ("two", ["a[1]"], ["a[1].onnx"]),
        ("three", ["a[0-9]"], ["a1.onnx"]),
    ):
        assert list(optimize_folder(tmp_path / "source", output=tmp_path / out, models=patterns).reports) == wanted


def test_a_folder_and_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the folder is the first argument"):
        optimize_folder(tmp_path, output=tmp_path / "out", model=tmp_path / "other")
