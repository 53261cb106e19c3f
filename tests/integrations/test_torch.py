"""From torch modules to quantized files, and MagR on modules themselves; outputs are compared in torch and in onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

import magr_onnx  # noqa: E402
import magr_onnx.torch as magr_torch  # noqa: E402
from magr_onnx.errors import CalibrationError, DependencyError, ExportError, MagrError, OptionError  # noqa: E402
from magr_onnx.integrations.torch.feeds import feeds  # noqa: E402
from magr_onnx.integrations.torch.weights import _new_value  # noqa: E402
from magr_onnx.passes.graph.torch_names import scope_of  # noqa: E402
from magr_onnx.passes.layers.linear import find  # noqa: E402
from magr_onnx.report.data import validation_text  # noqa: E402
from magr_onnx.report.reasons import Reason  # noqa: E402
from magr_onnx.runtime.ort.session import InputInfo, Session  # noqa: E402
from tests import graphs  # noqa: E402

nn = torch.nn


class Net(nn.Module):
    """Embeddings tied to the last layer, two layers that share a weight, and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(48, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Any) -> Any:
        x = self.tokens(input_ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.drop(self.down(torch.relu(self.up(x))))
        return self.head(self.second(torch.tanh(self.first(x))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16 * 16, 10)

    def forward(self, image: Any) -> Any:
        return self.out(torch.relu(self.norm(self.conv(image))).flatten(1))


def tokens(count: int = 32, seed: int = 0) -> Any:
    return torch.randint(0, 48, (count, 6), generator=torch.Generator().manual_seed(seed))


def loader(*tensors: Any, batch_size: int = 8) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=batch_size)


def values(module: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module: Any, before: dict[str, Any]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Any, Path]:
    net = Net()
    net.down.eval()  # one submodule in another mode than the rest
    before, output = values(net), tmp_path_factory.mktemp("torch") / "net.int8.onnx"
    data = loader(tokens(), torch.zeros(32))
    result = magr_torch.optimize(
        net, tokens(1), calibration=data, validation_data=data, output=output, output_names=["logits"], bits=8, effort="fast"
    )
    assert_untouched(net, before)
    assert net.training
    assert net.drop.training
    assert not net.down.training
    return net, result.report, output


def test_one_call(optimized: tuple[Net, Any, Path]) -> None:
    net, report, output = optimized
    assert len(report.layers) == 7
    assert report.calibration.startswith("the given DataLoader: 32 samples, ")
    assert "not used of each batch, since the model has no such input: the second item (labels?)" in report.notes
    assert report.validation.notes == ()  # said once
    assert report.source == "Net"
    assert report.command.startswith("magr_onnx.torch.optimize(model=<Net>, example_inputs=<Tensor>, calibration=<DataLoader>, output=")
    assert report.command.endswith("validation_data=<DataLoader>, output_names=['logits'], bits=8, effort='fast')")
    with Session(output) as session, torch.no_grad():
        for count in (1, 5):  # any batch size, from an example of one
            found = session.run({"input_ids": tokens(count, 7).numpy()})[0]
            expected = net.eval()(tokens(count, 7)).numpy()
            assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
    net.train()
    net.down.eval()


def test_a_convolution_with_a_normalization_in_it_has_its_own_name() -> None:
    """The exporter folds the normalization, and writes the result as a call of that."""
    program = magr_torch.export(Images(), torch.rand(1, 3, 4, 4)).program
    (conv,) = (row for row in magr_onnx.inspect(program).layers if row["op"] == "Conv")
    assert (conv["scope"], conv["weight"]) == ("conv", "conv.weight")
    data = loader(torch.rand(8, 3, 4, 4))
    for pattern in ("conv", "norm", "conv.weight"):
        report = magr_torch.optimize(program, calibration=data, effort="fast", exclude=[pattern]).report
        assert [row.scope for row in report.layers] == ["out"]
        assert [row.scope for row in report.skipped] == ["conv"]
    made, report = magr_torch.optimize(program, calibration=data, effort="fast")
    assert [row.scope for row in report.layers] == ["conv", "out"]
    assert "conv" in {scope_of(node) for node in made.graph if node.op_type == "Conv"}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 48, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(96, 48, batch_first=True)
        self.out = nn.Linear(48, 16)

    def forward(self, x: Any) -> Any:
        return self.out(self.gru(self.lstm(x)[0])[0])


@pytest.mark.long
def test_weights_of_a_recurrent_module_are_its_own() -> None:
    """The exporter cuts them up and joins them, where it does not fold that."""
    net = Recurrent()
    found = magr_onnx.inspect(magr_torch.export(net, torch.rand(2, 7, 40)).program)
    assert [row["scope"] for row in found.layers] == ["out"]
    assert [(row.scope, row.op, row.reason) for row in found.skipped] == [
        ("lstm", "LSTM", str(Reason.RECURRENT)),
        ("lstm", "LSTM", str(Reason.RECURRENT)),
        ("gru", "GRU", str(Reason.RECURRENT)),
    ]
    matrices = sum(p.numel() for name, p in net.named_parameters() if "weight" in name and "out" not in name)
    assert 4 * matrices <= sum(row.bytes for row in found.skipped) <= 1.1 * 4 * matrices  # some biases have two axes
    assert "lstm.weight_ih_l1" in found.skipped[1].detail


def test_a_comparison_calls_layers_what_their_modules_are(optimized: tuple[Net, Any, Path]) -> None:
    net, report, output = optimized
    program = magr_torch.export(net, tokens(1), output_names=["logits"]).program
    data = [{"input_ids": tokens().numpy()}]
    for exported in (program, program.model_proto):
        found = magr_onnx.validate(exported, output, data, latency=False)
        scopes = {row.output: row.scope for row in report.layers}
        assert {m.layer: m.scope for m in found.layers} == scopes
        worst = max(found.layers, key=lambda m: m.relative_error)
        assert f"    at {scopes[worst.layer]}" in validation_text(found)


@pytest.mark.long
def test_layers_are_called_what_their_modules_are(optimized: tuple[Net, Any, Path]) -> None:
    net, report, output = optimized
    scopes = ["attention.in_proj", "attention.out_proj", "up", "down", "first", "second", "head"]
    assert sorted(row.scope for row in report.layers) == sorted(scopes)
    assert all(scope in report.to_text() for scope in scopes)
    assert {row["scope"] for row in magr_onnx.inspect(magr_torch.export(net, tokens(1)).program).layers} == set(scopes)
    kept = {scope_of(node) for node in ir.load(output).graph if node.op_type == "MatMulNBits"}
    assert kept == set(scopes)
    program, data = magr_torch.export(net, tokens(2)).program, loader(tokens())
    tables = [{"match": ["up", "*in_proj*"], "bits": 8}]
    some = {"include": ["up", "*attention*"], "exclude": ["*out_proj"], "layers": tables}
    chosen = magr_torch.optimize(program, calibration=data, effort="fast", **some).report
    assert [(row.scope, row.bits) for row in chosen.layers] == [("attention.in_proj", 8), ("up", 8)]
    assert {row.scope for row in chosen.skipped if row.reason == "excluded by name"} == {"attention.out_proj"}
    rest = {row.scope for row in chosen.skipped if row.reason == "not among the layers to include"}
    assert rest == {*scopes} - {"attention.in_proj", "attention.out_proj", "up"}
    assert "attention.out_proj (node_" in chosen.to_text()
    for wrong in ({"layers": [{"match": "*out_prok*", "bits": 8}]}, {"exclude": ["*out_prok"]}):
        with pytest.raises(OptionError, match=r"'\*out_prok\*?' matches no layer.*; did you mean 'out_proj'"):
            magr_torch.optimize(program, calibration=data, effort="fast", **wrong)
    with pytest.raises(OptionError, match=r"'atention\.in_proj' matches no layer that is converted; did you mean 'attention\.in_proj'"):
        magr_torch.optimize(program, calibration=data, effort="fast", layers=[{"match": "atention.in_proj", "bits": 8}])


def test_layers_of_one_module_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
            self.image = nn.Conv2d(1, 4, 3)

        def forward(self, x: Any, image: Any) -> Any:
            return self.body(self.body(x)) + self.image(image).mean(), x @ torch.ones(32, 32)

    given = (torch.randn(8, 32), torch.randn(8, 1, 5, 5))
    report = magr_torch.optimize(Twice(), given, calibration=[given], bits=8, effort="fast").report
    assert [row.scope for row in report.layers] == ["image", "body.0", "body.0@1", ""]
    assert report.layers[-1].label == report.layers[-1].name


def test_names_shapes_and_metadata_are_kept(optimized: tuple[Net, Any, Path]) -> None:
    net, _, output = optimized
    model = ir.load(output)
    assert [(v.name, str(v.shape[0]), v.shape[1]) for v in model.graph.inputs] == [("input_ids", "batch", 6)]
    assert [(v.name, str(v.shape[0]), v.shape[2]) for v in model.graph.outputs] == [("logits", "batch", 48)]
    assert model.producer_name == "pytorch"
    program = magr_torch.export(net, tokens(1)).program
    names = {n.name: n.metadata_props["namespace"] for n in program.model.graph if "namespace" in n.metadata_props}
    kept = {n.name: n.metadata_props["namespace"] for n in model.graph if n.name in names}
    assert len(kept) > 10
    assert all(kept[name] == names[name] for name in kept)


def test_a_program_of_the_callers(optimized: tuple[Net, Any, Path]) -> None:
    net, report, _ = optimized
    dims = {"input_ids": {0: torch.export.Dim("samples"), 1: torch.export.Dim("time", min=2, max=64)}}
    program = magr_torch.export(net, {"input_ids": tokens(2)}, dynamic_shapes=dims).program
    batches = [{"input_ids": t, "labels": t} for t in tokens().split(8)]
    result = magr_torch.optimize(program, calibration=batches, bits=8, effort="fast")
    assert [str(d) for d in result.model.graph.inputs[0].shape] == ["samples", "time"]
    assert "not used of each batch, since the model has no such input: labels" in result.report.notes
    assert [r.estimate for r in result.report.layers] == pytest.approx([r.estimate for r in report.layers], rel=1e-3)


def test_shapes_that_cannot_vary_stay_fixed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 16)

        def forward(self, x: Any) -> Any:
            return self.layer(x.reshape(4, 32)) if x.shape[0] == 4 else x

    result = magr_torch.optimize(Fixed(), torch.randn(4, 32), calibration=[torch.randn(4, 32) for _ in range(4)], effort="fast")
    assert result.model.graph.inputs[0].shape == [4, 32]
    assert any("shapes are fixed to those of the example, the batch size too" in n for n in result.report.notes)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: Any) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(kind)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    result = magr_torch.optimize(net, x[:2].to(kind), calibration=loader(x.to(kind)), bits=8, effort="fast")
    assert net[0].weight.dtype == kind
    assert any("bfloat16" in n for n in result.report.notes) == (kind == torch.bfloat16)
    with Session(result.model) as session, torch.no_grad():
        found = session.run({session.inputs[0].name: x.numpy().astype(session.inputs[0].dtype)})[0].astype(np.float32)
        expected = net(x.to(kind)).float().numpy()
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()


def test_convolutions() -> None:
    images = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = Images()
    result = magr_torch.optimize(net, images[:1], calibration=loader(images, torch.zeros(32)), bits=8, effort="fast")
    assert {r.op for r in result.report.layers} == {"Conv", "Gemm"}
    assert net.training
    with Session(result.model) as session, torch.no_grad():
        found, expected = session.run({"image": images.numpy()})[0], net.eval()(images).numpy()
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()


@pytest.fixture(scope="module")
def reduced() -> tuple[Net, Net, Any]:
    net, original = Net(), Net()
    parameters = dict(net.named_parameters(remove_duplicate=False))
    result = magr_torch.magr_(net, tokens(2), loader(tokens()), alpha=0.02)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
        assert parameter.requires_grad
    assert net.training
    return net, original, result


def test_magr_changes_what_it_may(reduced: tuple[Net, Net, Any]) -> None:
    net, original, result = reduced
    assert {c.name: c.tied for c in result.changed} == {
        "attention.in_proj_weight": (),
        "attention.out_proj.weight": (),
        "up.weight": (),
        "down.weight": (),
        "first.weight": ("second.weight",),
    }
    assert result.unchanged.keys() == {"tokens.weight", "head.weight"}
    assert "Gather" in result.unchanged["head.weight"]
    assert net.second.weight is net.first.weight
    assert net.head.weight is net.tokens.weight
    changed = {n for c in result.changed for n in (c.name, *c.tied)}
    for name, value in original.state_dict().items():
        assert torch.equal(net.state_dict()[name], value) == (name not in changed), name
    for change in result.changed:
        assert net.state_dict()[change.name].abs().max() == pytest.approx(change.after)
        assert change.after < change.before == pytest.approx(float(original.state_dict()[change.name].abs().max()))
    assert "first.weight: largest magnitude" in str(result)
    called = "magr_onnx.torch.magr_(module=<Net>, example_inputs=<Tensor>, calibration=<DataLoader>, alpha=0.02)"
    assert (result.report.command, result.report.source) == (called, "Net")


class Tied(nn.Module):
    """A table that is large enough to be asked about, and is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up, self.head = nn.Embedding(256, 32), nn.Linear(32, 32), nn.Linear(32, 256, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Any) -> Any:
        return self.head(torch.relu(self.up(self.tokens(input_ids))))


@pytest.mark.parametrize("include", [[], ["up"], ["up", "head"]])
def test_reasons_of_magr_are_its_own(include: list[str]) -> None:
    found = magr_torch.magr_(Tied(), tokens(2), loader(tokens()), include=include)
    assert [change.name for change in found.changed] == ["up.weight"]
    assert found.unchanged.keys() == {"tokens.weight", "head.weight"}
    for why in found.unchanged.values():
        assert why.endswith("reads it, and would change with it")
    assert "embeddings" not in " ".join([*found.report.notes, *(note for row in found.report.layers for note in row.notes)])
    if include:
        wrong = "MagR changed no parameter: .*up.weight: node_[a-zA-Z_0-9]*: not among the layers to include"
        with pytest.raises(MagrError, match=wrong):
            magr_torch.magr_(Tied(), tokens(2), loader(tokens()), include=["head"])


def test_the_module_computes_what_the_onnx_model_of_magr_does(reduced: tuple[Net, Net, Any]) -> None:
    net, original, result = reduced
    program = magr_torch.export(original, tokens(2)).program
    head = next(layer["name"] for layer in magr_onnx.inspect(program).layers if layer["n"] == 48)
    data = [{"input_ids": t.numpy()} for t in tokens().split(8)]
    model = magr_onnx.optimize(program, data, pipeline_text="magr{alpha=0.02}", exclude=[head]).model
    x = tokens(9, seed=5)
    with Session(model) as session, Session(program.model) as floats, torch.no_grad():
        expected, before = (s.run({"input_ids": x.numpy()})[0] for s in (session, floats))
        found = net.eval()(x).numpy()
    net.train()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(before - expected).max() > 1e-3 * np.abs(expected).max()
    assert result.report.pipeline.startswith("magr{alpha=0.02")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_state_dict_leaves_the_module_alone(kind: Any) -> None:
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).to(kind)
    before = values(net)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(kind)
    state, result = magr_torch.magr(net, x[:2], loader(x), alpha=0.05)
    assert_untouched(net, before)
    assert [c.name for c in result.changed] == ["0.weight", "2.weight"]
    called = "magr_onnx.torch.magr(module=<Sequential>, example_inputs=<Tensor>, calibration=<DataLoader>, alpha=0.05)"
    assert result.report.command == called
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in before.items()}
    other = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).to(kind)
    other.load_state_dict(state)
    with torch.no_grad():
        a, b = net(x).float(), other(x).float()
    assert 0 < float((a - b).square().sum() / a.square().sum()) < 0.02


def test_what_magr_leaves_alone_in_a_module() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.used, self.unused = nn.Conv2d(3, 8, 2), nn.Linear(32, 32), nn.Linear(32, 32)
            self.scaled, self.part = nn.Linear(32, 8), nn.Linear(32, 32)

        def forward(self, x: Any) -> Any:
            y = self.used(self.conv(x).flatten(1))
            return nn.functional.linear(y, 2 * self.scaled.weight), y @ self.part.weight[:, :16]

    x = torch.randn(16, 3, 3, 3)
    _, result = magr_torch.magr(Odd(), x[:2], [x[:8], x[8:]])
    assert [c.name for c in result.changed] == ["used.weight"]
    assert {n: why.split()[0] for n, why in result.unchanged.items()} == {
        "conv.weight": "a",
        "unused.weight": "not",
        "scaled.weight": "Mul",
        "part.weight": "Slice",
    }
    with pytest.raises(MagrError, match=r"no layer can be converted|changed no parameter"):
        magr_torch.magr(nn.Sequential(nn.Conv2d(3, 8, 2)), x[:2], [x])


INPUTS = (InputInfo("ids", np.dtype("int64"), (None, None)), InputInfo("scale", np.dtype("float32"), (None,)))
IDS, SCALE, LABEL = torch.arange(6).reshape(3, 2), torch.ones(3), torch.zeros(3)


@pytest.mark.parametrize(
    "batch",
    [
        (IDS, SCALE),
        [IDS, SCALE, LABEL],
        {"ids": IDS, "labels": LABEL, "scale": SCALE},
        ((IDS, SCALE), LABEL),
        ({"ids": IDS, "scale": SCALE}, LABEL),
        (IDS.to(torch.int32), SCALE.to(torch.bfloat16)),
        (IDS.numpy(), SCALE.double().numpy()),
    ],
)
def test_forms_of_batches(batch: Any) -> None:
    (found,) = feeds([batch], INPUTS)
    assert {n: a.dtype for n, a in found.items()} == {"ids": np.int64, "scale": np.float32}
    np.testing.assert_array_equal(found["ids"], IDS.numpy())
    np.testing.assert_array_equal(found["scale"], SCALE.numpy())


def test_batches_are_cut_and_counted() -> None:
    found = feeds(iter([(IDS, SCALE)] * 5), INPUTS, samples=7, batch_size=2)
    assert [len(b["ids"]) for b in found] == [2, 1] * 3
    assert found.notes == ("calibration stopped after 9 samples (samples=7)",)
    assert len(feeds([(IDS, SCALE)] * 5, INPUTS, samples=None)) == 5
    picked = feeds([{"x": IDS, "y": SCALE}], INPUTS, to_inputs=lambda b: (b["x"], b["y"]))
    assert picked.notes == ()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IDS, "batch 0 has 1 items; the model's inputs are ids: int64"),
        ({"ids": IDS}, "batch 0 has ids and lacks scale"),
        (3, "batch 0 is a int; expected a tensor, a tuple, a list or a dict"),
    ],
)
def test_batches_that_do_not_fit(batch: Any, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        feeds([batch], INPUTS)
    assert message in str(caught.value)


def test_stacked_samples() -> None:
    for given in ((IDS.repeat(6, 1)), IDS.repeat(6, 1).numpy(), {"ids": IDS.repeat(6, 1)}):
        found = feeds(given, INPUTS[:1], samples=10, batch_size=4)
        assert [b["ids"].shape for b in found] == [(1, 2)] * 10  # few samples: parts of them are held out
        assert found.notes == ("the first 10 of 18 samples were used (samples=10)",)
    many = feeds(IDS.repeat(12, 1), INPUTS[:1], samples=None, batch_size=4)
    assert [b["ids"].shape for b in many] == [(4, 2)] * 9
    cut = feeds([IDS.repeat(6, 1)], INPUTS[:1], samples=None, batch_size=8)  # a batch of a loader
    assert [b["ids"].shape for b in cut] == [(8, 2), (8, 2), (2, 2)]
    fixed = InputInfo("ids", np.dtype("int64"), (2, None))
    assert [b["ids"].shape for b in feeds(IDS.repeat(4, 1), [fixed])] == [(2, 2)] * 6
    filled = feeds(IDS.repeat(2, 1), [fixed])
    assert [b["ids"].shape for b in filled] == [(2, 2)] * 6
    assert filled.weights == (0.5,) * 6
    odd = feeds([IDS[:2], IDS[:1]], [fixed])  # the last batch of a loader
    assert [b["ids"].shape for b in odd] == [(2, 2)] * 2
    assert odd.weights == (1, 0.5)
    assert odd.notes == ("the model takes 2 samples at a time: 1 of 3 were repeated to fill batches, and count once",)


def test_a_single_sample_is_refused_once() -> None:
    with pytest.raises(
        CalibrationError, match=r"^batch 0: ids has the shape \[2\] of a single sample.*to_inputs=lambda sample: sample"
    ) as caught:
        feeds(list(IDS), INPUTS[:1])
    assert "problems" not in str(caught.value)
    assert len(feeds(list(IDS), INPUTS[:1], to_inputs=lambda sample: sample[None])) == 3


SAMPLE = torch.arange(8.0)


@pytest.mark.parametrize(
    "batch",
    [
        [(SAMPLE, 0), (SAMPLE + 1, 1)],
        [{"x": SAMPLE, "labels": 0}, {"x": SAMPLE + 1, "labels": 1}],
        [{"x": SAMPLE.tolist()}, {"x": (SAMPLE + 1).tolist()}],
    ],
)
def test_lists_of_samples_are_stacked(batch: Any) -> None:
    x = InputInfo("x", np.dtype(np.float32), (None, 8))
    (feed,) = feeds([batch], [x])
    np.testing.assert_array_equal(feed["x"], np.stack([SAMPLE.numpy(), SAMPLE.numpy() + 1]))
    with pytest.raises(CalibrationError, match=r"batch 0 is a list of samples, and those of x have shapes \[8\] and \[3\]; pad"):
        feeds([[(SAMPLE, 0), (SAMPLE[:3], 1)]], [x])


def test_no_batch_is_read_that_is_not_needed() -> None:
    def endless() -> Any:
        for number in range(3):
            assert number < 2, "a batch too many"
            yield torch.zeros(16, 8)

    x = InputInfo("x", np.dtype(np.float32), (None, 8))
    stream = feeds(endless(), [x], samples=32)
    assert (len(stream), stream.notes) == (2, ("calibration stopped after 32 samples (samples=32)",))
    assert feeds([torch.zeros(16, 8)] * 2, [x], samples=32).notes == ()


def test_the_batch_size_of_a_recipe_is_used() -> None:
    model = nn.Linear(64, 64)
    recipe = {"batch_size": 8, "bits": 8}
    found = magr_torch.optimize(model, torch.zeros(2, 64), calibration=[torch.randn(64, 64)], recipe=recipe).report
    assert "64 samples, 64 rows" in found.calibration
    few = "2 calibration batches are too few to hold some out"
    assert not any(few in note for note in found.notes)
    given = magr_torch.optimize(model, torch.zeros(2, 64), calibration=[torch.randn(64, 64)], recipe=recipe, batch_size=32).report
    assert "64 samples, 64 rows" in given.calibration
    assert any(few in note for note in given.notes)


def test_a_recipe_says_what_is_not_given(tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", input=np.random.default_rng(0).standard_normal((64, 64), np.float32))
    recipe = {"calibration": str(tmp_path / "inputs.npz"), "output": str(tmp_path / "out.onnx"), "bits": 8, "effort": "fast"}
    report = magr_torch.optimize(nn.Linear(64, 64), torch.zeros(2, 64), recipe=recipe).report
    assert report.calibration.endswith("64 samples, 64 rows")
    assert report.output == str(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").is_file()


class Lonely(nn.Module):
    """Something else for one sample than for more; ``names`` that forward takes in an order of its own."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(64, 64), odd

    def forward(self, x: Any, shift: Any) -> Any:
        y = self.layer(x) - shift
        return {"y": y * 0 + 7 if self.odd and x.shape[0] == 1 else y, "best": y.argmax(-1)}


@pytest.mark.parametrize("odd", [True, False])
def test_an_example_of_one_sample_keeps_its_result(odd: bool) -> None:
    torch.manual_seed(0)
    model, example = Lonely(odd), {"shift": torch.randn(1, 64), "x": torch.randn(1, 64)}
    program, notes = magr_torch.export(model, example)
    assert ["computes y differently than with more" in note for note in notes] == [True] * odd
    with torch.no_grad(), Session(program.model) as session:
        assert {i.shape[0] for i in session.inputs} == {1 if odd else None}
        found = session.run({name: value.numpy() for name, value in example.items()}, ["y", "best"])
        wanted = model(**example)
    np.testing.assert_allclose(found[0], wanted["y"].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[1], wanted["best"].numpy())


def test_every_initializer_of_a_tied_weight_is_looked_at() -> None:
    """Where an exporter keeps one for each name, a reader of the second counts."""
    weight = graphs.random(8, 8)
    b = graphs.Builder()
    x = b.input("x", ["batch", 8])
    first = b.node("MatMul", [x, b.constant("first.weight", weight)], "layer")
    model = b.model(b.node("Add", [first, b.constant("second.weight", weight)], "other"), ["batch", 8])
    layers, _ = find(model)
    reduced = {layer.name: layer for layer in layers}
    for names, why in ((["first.weight"], None), (["first.weight", "second.weight"], "Add other reads it, and would change with it")):
        assert _new_value(names, torch.from_numpy(weight), model, layers, reduced, {"layer": None}, {})[0] == why


def test_a_half_precision_example_of_a_float_module_is_refused() -> None:
    with pytest.raises(ExportError, match="does not run on example_inputs"):
        magr_torch.export(nn.Linear(8, 8), torch.zeros(2, 8, dtype=torch.float16))


class Named(nn.Module):
    """Outputs by name, of which one key has two tensors; a loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(32, 48)

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits = self.head(x)
        found = {"logits": logits, "states": (logits.exp(), x * 2)}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def test_outputs_are_called_what_forward_calls_them() -> None:
    net, x = Named().eval(), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    result = magr_torch.optimize(net, x[:2], calibration=x, validation_data=x, bits=8, effort="fast")
    assert [v.name for v in result.model.graph.outputs] == ["logits", "states_0", "states_1"]
    measured = {m.output: m for m in next(iter(result.report.validation.arithmetics.values()))}
    assert measured["logits"].kl is not None
    with Session(result.model) as session, torch.no_grad():
        found, expected = session.run({"x": x.numpy()}), net(x)
    wanted = (expected["logits"], *expected["states"])
    for one, other in zip(found, wanted, strict=True):
        assert np.square(one - other.numpy()).sum() < 1e-3 * np.square(other.numpy()).sum()


def test_layers_the_mask_says_nothing_of_are_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Any, attention_mask: Any) -> Any:
            rows = torch.relu(self.body(x)) * attention_mask[..., None]
            return self.head(rows.sum(1) / attention_mask.sum(1, keepdim=True))

    data = {"x": torch.randn(16, 6, 32), "attention_mask": torch.ones(16, 6, dtype=torch.int64)}
    example = {name: value[:2] for name, value in data.items()}
    notes = magr_torch.optimize(Pooled(), example, calibration=data, bits=8, effort="fast").report.notes
    assert not [n for n in notes if "attention_mask" in n]  # a mask that excludes nothing changes nothing
    data["attention_mask"][3, 4:] = 0
    notes = magr_torch.optimize(Pooled(), example, calibration=data, bits=8, effort="fast").report.notes
    assert [n for n in notes if "attention_mask" in n] == [
        "head: all input rows count, since there is not one for each element of the mask 'attention_mask' (pooled or reshaped before)"
    ]


def test_labels_in_the_example_are_noted() -> None:
    exported = magr_torch.export(Named(), {"x": torch.randn(2, 32), "labels": torch.zeros(2, dtype=torch.int64)})
    assert [v.name for v in exported.program.model.graph.outputs] == ["loss", "logits", "states_0", "states_1"]
    assert any(n.startswith("the result has an input 'labels'") for n in exported.notes)


def test_the_example_leaves_nothing_behind() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            self.calls.add_(1)
            return self.layer(x) + torch.rand_like(x)

    net, x = Counting(), torch.randn(2, 32)
    state = torch.random.get_rng_state()
    magr_torch.export(net, x)
    assert float(net.calls) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_that_are_views_of_one_nan_stay() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("nothing", torch.tensor(float("nan")).expand(32))
            self.register_buffer("flags", torch.ones(2, dtype=torch.bool))

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    net = Masked()
    magr_torch.export(net, torch.randn(2, 32))
    assert bool(net.nothing.isnan().all())


@pytest.mark.parametrize("samples", [0, -5, "5", True, 2.0])
def test_numbers_of_samples_that_are_none_are_refused(samples: Any) -> None:
    with pytest.raises(OptionError, match=r"samples = .*: expected"):
        feeds([(IDS, SCALE)], INPUTS, samples=samples)
    with pytest.raises(OptionError, match=r"samples = .*: expected"):
        magr_torch.optimize(Net(), torch.randn(2, 32), calibration=torch.randn(8, 32), samples=samples)


def test_magr_says_which_options_it_has() -> None:
    x, data = torch.randn(2, 32), torch.randn(8, 32)
    with pytest.raises(OptionError, match=r"magr has no option 'block_sise'; did you mean 'block_size'"):
        magr_torch.magr(Net(), x, data, block_sise=3)
    with pytest.raises(OptionError, match=r"magr has no option 'effort'"):
        magr_torch.magr_(Net(), x, data, effort="fast")
    with pytest.raises(OptionError, match=r"magr has no option 'settings'"):
        magr_torch.magr(Net(), x, data, settings={"exclude": ["*"]})
    with pytest.raises(OptionError, match=r"block_size = 'x'"):
        magr_torch.magr_(Net(), x, data, block_size="x")


def test_options_are_checked_before_the_export(tmp_path: Path) -> None:
    class Never(nn.Module):
        def forward(self, x: Any) -> Any:
            raise AssertionError("exported")

    for wrong in ({"bit": 4}, {"bits": 9}, {"preset": "llm-int5"}, {"output": tmp_path / "missing" / "x.onnx"}, {"effort": "none"}):
        with pytest.raises(MagrError) as caught:
            magr_torch.optimize(Never(), torch.randn(2, 4), calibration=[torch.randn(2, 4)], **wrong)
        assert "exported" not in str(caught.value)
    with pytest.raises(ExportError, match="exported"):
        magr_torch.optimize(Never(), torch.randn(2, 4), calibration=[torch.randn(2, 4)])


def test_options_of_magr_are_checked_before_the_export() -> None:
    class Never(nn.Module):
        def forward(self, x: Any) -> Any:
            raise AssertionError("exported")

    for wrong in (
        {"provider": "bogus"},
        {"cache": "much"},
        {"layers": [{"match": "*", "bits": 4}]},
        {"recipe": {"bits": 9}},
        {"alpha": -1},
    ):
        with pytest.raises(MagrError) as caught:
            magr_torch.magr(Never(), torch.randn(2, 4), [torch.randn(2, 4)], **wrong)
        assert "exported" not in str(caught.value)
    with pytest.raises(ExportError, match="exported"):
        magr_torch.magr(Never(), torch.randn(2, 4), [torch.randn(2, 4)])


def test_magr_needs_a_strength() -> None:
    with pytest.raises(OptionError, match=r"alpha = None: .*give one"):
        magr_torch.magr(nn.Linear(4, 4), torch.randn(2, 4), [torch.randn(2, 4)], alpha=None)


class SameName(nn.Module):
    """A submodule that is called as an argument of forward is."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        return x + self.meta(meta)


def test_errors_of_the_exporter_are_whole_and_say_what_to_do() -> None:
    rows = torch.randn(2, 8)
    with pytest.raises(ExportError, match=r"meta: a submodule and an argument of forward have this name, .*; rename one; or export"):
        magr_torch.export(SameName(), (rows, rows))
    with pytest.raises(ExportError, match=r"`inputs` has 1 elements, but `dynamic_shapes` has 2 elements; torch\.onnx\.export"):
        magr_torch.export(nn.Linear(8, 8), (rows,), dynamic_shapes=({0: "b"}, {0: "b"}))


def test_errors_say_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    class Jump(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2 if x.sum() > 0 else x

    class NoOperator(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.eigvals(x)

    with pytest.raises(ExportError, match=r"torch cannot export Jump to ONNX: .*torch\.cond"):
        magr_torch.optimize(Jump(), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"torch cannot export NoOperator to ONNX: .*; ONNX has no such operator") as caught:
        magr_torch.export(NoOperator(), torch.randn(3, 4, 4))
    assert "torch.cond" not in str(caught.value)
    assert capfd.readouterr().err == ""
    wrong = r"Named does not run on example_inputs: TypeError: .*; forward takes x, labels \(optional\)"
    with pytest.raises(ExportError, match=wrong):
        magr_torch.export(Named(), {"y": torch.randn(2, 32)})
    with pytest.raises(OptionError, match=r"input_names has 2 names \(a, b\), and the module has 1 inputs"):
        magr_torch.export(nn.Linear(4, 4), torch.randn(2, 4), input_names=["a", "b"])
    with pytest.raises(OptionError, match=r"output_names has 4 names .* 3 outputs \(logits, states_0, states_1\)"):
        magr_torch.export(Named(), torch.randn(2, 32), output_names=["a", "b", "c", "d"])
    with pytest.raises(OptionError, match="example_inputs are needed"):
        magr_torch.optimize(nn.Linear(4, 4))
    with pytest.raises(OptionError, match="example_inputs is empty"):
        magr_torch.export(nn.Linear(4, 4), ())
    with pytest.raises(OptionError, match="dynamic_shapes='all'"):
        magr_torch.export(nn.Linear(4, 4), torch.randn(2, 4), dynamic_shapes="all")


def test_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import magr_onnx\n"
        "try:\n    import magr_onnx.torch\n"
        "except magr_onnx.DependencyError as error:\n    print(isinstance(error, ImportError), error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("True magr_onnx.torch needs torch")
    assert "pip install 'onnx-magr[torch]'" in out
    assert issubclass(DependencyError, MagrError)
