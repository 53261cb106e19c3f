"""Validation of untrusted model files: no data outside their folder, no missing data, no constants of excessive size.

Only the protobuf message is read, in one pass without recursion: time is linear in the file, and no constant is expanded. Operators, their
inputs and attribute types, and the order of nodes are left to onnx's checker, which runs afterwards; that bodies have the inputs and
outputs of their nodes it does not check.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import Message
from onnx.external_data_helper import uses_external_data

from magr_onnx.errors import ModelError, raise_all
from magr_onnx.model_io.expansion import expanded_bytes

OLDEST_OPSET = 7
"""Older opsets broadcast Add and similar operators by an attribute, and onnxruntime does not support them."""

SCAN_OF_BATCHES = 8
"""Opset whose Scan runs over a batch of sequences: its first input has their lengths, its body has neither them nor the axis."""

LARGEST_CONSTANT = 1 << 32
"""Largest size in bytes that a constant may expand to (ConstantOfShape, Expand, sparse tensors ...)."""

_TOO_LARGE = f"more than the {LARGEST_CONSTANT >> 30} GiB that are expanded at most"

LARGEST_FILE = (1 << 31) - 1
"""Largest size of a protobuf message in bytes."""

_ALIASES = 16
"""How often the bytes of external files may be used on average; tied weights use them a few times."""

_MOST_PROBLEMS = 20
_FIELDS = {
    **dict.fromkeys(("FLOAT", "COMPLEX64"), "float_data"),
    **dict.fromkeys(("DOUBLE", "COMPLEX128"), "double_data"),
    **dict.fromkeys(("UINT32", "UINT64"), "uint64_data"),
    "INT64": "int64_data",
    "STRING": "string_data",
}


@dataclass(slots=True)
class _Findings:
    """Problems found, and sizes of external files, which are looked for in a folder and may lie in one of some."""

    folder: Path | None
    allowed: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)
    files: dict[Path, int] = field(default_factory=dict)
    external_bytes: int = 0
    scan_has_lengths: bool = False

    def add(self, text: str) -> None:
        self.problems.append(text)

    @property
    def full(self) -> bool:
        return len(self.problems) >= _MOST_PROBLEMS


def check(proto: onnx.ModelProto, name: str, path: Path | None) -> frozenset[Path]:
    """Validate a model.

    Args:
        proto: The message, without external data loaded.
        name: Name of the model in messages.
        path: Its file, beside which external data lies; None for a model in memory, which must have none. Links may lead to data beside the
            file that ``path`` itself is a link to, as in the cache of the Hugging Face hub; onnxruntime has the same rule.

    Returns:
        The files of the model's external data.

    Raises:
        ModelError: Lists up to 20 problems.
    """
    findings = _Findings(None) if path is None else _Findings(path.parent, (path.parent.resolve(), path.resolve().parent))
    for message, name_of_field in itertools.islice(_not_utf8(proto), _MOST_PROBLEMS):
        label = getattr(message, "name", "") or getattr(message, "key", "")
        findings.add(f"{message.DESCRIPTOR.name} {label!r} has a {name_of_field} that is not UTF-8; change or remove this text")
    raise_all(ModelError, [f"{name}: {p}" for p in findings.problems])
    _opsets(proto, findings)
    for graph in _walk(_main(proto)):
        _graph(graph, False, findings)
    for body in _walk(proto.functions):
        _graph(body, True, findings)
    if findings.external_bytes > max(LARGEST_CONSTANT, _ALIASES * sum(findings.files.values())):
        findings.add(f"tensors take {findings.external_bytes} bytes from external files that have {sum(findings.files.values())}")
    raise_all(ModelError, [f"{name}: {p}" for p in findings.problems[:_MOST_PROBLEMS]])
    return frozenset(findings.files)


def _not_utf8(proto: onnx.ModelProto) -> Iterator[tuple[Message, str]]:
    """Yield every message in a model with a text that is not UTF-8, and the name of its field; protobuf returns such texts as bytes."""
    stack: list[Message] = [proto]
    while stack:
        message = stack.pop()
        for kind, value in message.ListFields():
            if kind.message_type is not None:
                stack += [value] if isinstance(value, Message) else value
            elif kind.type == kind.TYPE_STRING and bytes in map(type, [value] if isinstance(value, str | bytes) else value):
                yield message, kind.name


def custom_operators(model: ir.Model) -> list[str]:
    """Return the operators (``domain::name``) that are neither ONNX's, nor onnxruntime's, nor functions of the model."""
    functions = {(f.domain, f.name) for f in model.functions.values()}
    nodes = [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]
    return sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in _DOMAINS and (n.domain, n.op_type) not in functions})


_DOMAINS = {"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training", "org.pytorch.aten"}
_DOMAINS |= {"com.microsoft", "com.microsoft.dml", "com.microsoft.experimental", "com.microsoft.nchwc", "com.ms.internal.nhwc"}


def _opsets(proto: onnx.ModelProto, findings: _Findings) -> None:
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            findings.add(f"imports opsets {versions[domain]} and {entry.version} of domain {domain!r}; there can be only one")
    opset, newest = versions.get(""), onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        old, new = "convert it with onnx.version_converter", "update onnx and onnxruntime, or export it with an older one"
        findings.add(f"has opset {opset}, and {OLDEST_OPSET} to {newest} are supported; {old if opset < OLDEST_OPSET else new}")
    findings.scan_has_lengths = opset == SCAN_OF_BATCHES
    if proto.ir_version > onnx.IR_VERSION:
        newer = f"has IR version {proto.ir_version}, newer than the {onnx.IR_VERSION} of the installed onnx"
        findings.add(f"{newer}; update onnx and onnxruntime")


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Yield every graph and function body of a model, including subgraphs and training graphs."""
    yield from _walk(_main(proto))
    yield from _walk(proto.functions)


def _main(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [proto.graph, *(g for info in proto.training_info for g in (info.initialization, info.algorithm))]


def _walk(roots: Iterable[onnx.GraphProto | onnx.FunctionProto]) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    stack = list(roots)
    while stack:
        graph = stack.pop()
        yield graph
        stack += [g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def _graph(graph: onnx.GraphProto | onnx.FunctionProto, inside_function: bool, findings: _Findings) -> None:
    constants: dict[str, onnx.TensorProto] = {}
    if isinstance(graph, onnx.GraphProto):
        for tensor in graph.initializer:
            _tensor(tensor, findings)
            constants[tensor.name] = tensor
        for sparse in graph.sparse_initializer:
            _sparse(sparse, findings)
        for value in graph.input:
            kind = value.type.tensor_type.elem_type
            if value.name in constants and constants[value.name].data_type != kind:
                findings.add(f"input {value.name} has type {kind}, and its initializer type {constants[value.name].data_type}")
    for node in graph.node:
        if findings.full:
            return
        for attribute in node.attribute:
            _attribute(node, attribute, inside_function, findings)
        if node.op_type == "Constant" and node.domain in _ONNX and len(node.attribute) != 1:
            findings.add(f"Constant {node.name or list(node.output)} must have one attribute, and has {len(node.attribute)}")
        if node.domain in _ONNX and node.op_type in ("If", "Loop", "Scan") and (problem := _bodies(node, findings.scan_has_lengths)):
            findings.add(f"node {node.name or list(node.output)} ({node.op_type}) {problem}")
        if node.op_type == "Constant" and node.output and len(node.attribute) == 1 and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
        size = None if findings.problems else expanded_bytes(node, constants)
        if size is not None and size > LARGEST_CONSTANT:
            findings.add(f"node {node.name or list(node.output)} ({node.op_type}) makes {size:.3g} bytes of constants, {_TOO_LARGE}")


def _attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto, inside_function: bool, findings: _Findings) -> None:
    where = f"attribute {attribute.name!r} of node {node.name or list(node.output)} ({node.op_type})"
    if attribute.ref_attr_name and not inside_function:
        findings.add(f"{where} refers to attribute {attribute.ref_attr_name!r} of a function, and is in none")
    if attribute.type not in _ATTRIBUTE_TYPES:
        findings.add(f"{where} has the unknown type {attribute.type}")
    if node.domain in _ONNX and not attribute.ref_attr_name and (problem := _value(node, attribute)):
        findings.add(f"{where} {problem}")
    if attribute.HasField("t"):
        _tensor(attribute.t, findings, where)
    for tensor in attribute.tensors:
        _tensor(tensor, findings, where)
    if attribute.HasField("sparse_tensor"):
        _sparse(attribute.sparse_tensor, findings, where)
    for sparse in attribute.sparse_tensors:
        _sparse(sparse, findings, where)


def _bodies(node: onnx.NodeProto, scan_has_lengths: bool) -> str | None:
    """Describe what is wrong where a node and a body of it do not have inputs and outputs that belong together, else None."""
    inputs, outputs = 0 if node.op_type == "If" else len(node.input), len(node.output) + (node.op_type == "Loop")
    if node.op_type == "Scan":
        inputs -= scan_has_lengths
        scanned = next((a.i for a in node.attribute if a.name == "num_scan_inputs" and not a.ref_attr_name), 1)
        if not 1 <= scanned <= inputs <= scanned + len(node.output):
            return f"has num_scan_inputs = {scanned}, {inputs} inputs and {len(node.output)} outputs; give every state an output"
    for body in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
        actual = len({v.name for v in body.input} - {t.name for t in body.initializer})
        if (actual, len(body.output)) != (inputs, outputs):
            expected = f"as one of {inputs} inputs and {outputs} outputs"
            return f"has a body {body.name!r} of {actual} inputs and {len(body.output)} outputs, and runs it {expected}"
    return None


def _value(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> str | None:
    """Describe an invalid value of an attribute on which onnx or onnxruntime would crash or hang, else None."""
    if not _is_text(attribute):
        return "is not UTF-8"
    if node.op_type == "Einsum" and attribute.name == "equation" and not _EQUATION.fullmatch(attribute.s):
        return f"is no equation: {attribute.s[:80]!r}"
    if attribute.name in _TYPES and attribute.type == onnx.AttributeProto.INT and attribute.i not in _DATA_TYPES:
        return f"is the unknown type {attribute.i}"
    counts = attribute.ints if attribute.type == onnx.AttributeProto.INTS else [attribute.i]
    if attribute.name in _COUNTS and any(i < 1 for i in counts):
        return f"is {list(counts)}; a convolution or pool counts from 1"
    return None


def _is_text(attribute: onnx.AttributeProto) -> bool:
    """Return whether the strings of an attribute are UTF-8."""
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


_ONNX = ("", "ai.onnx")
_EQUATION = re.compile(rb"[A-Za-z,.> -]*")
"""ONNX's shape inference hangs on other characters."""

_COUNTS = ("group", "strides", "dilations", "kernel_shape")
"""Attributes onnxruntime divides by, some without a check."""

_DATA_TYPES = set(onnx.TensorProto.DataType.values())
_TYPES = ("to", "dtype", "output_dtype", "stash_type")
_ATTRIBUTE_TYPES = set(onnx.AttributeProto.AttributeType.values()) - {onnx.AttributeProto.UNDEFINED}


def _size(dtype: int, dims: Sequence[int]) -> tuple[int, int]:
    """Return elements and bytes of a dense tensor; a string counts as one byte.

    Raises:
        ValueError: An unknown type, or a negative dimension.
    """
    try:
        kind = ir.DataType(dtype)
    except ValueError:
        raise ValueError(f"has the unknown type {dtype}") from None
    if kind == ir.DataType.UNDEFINED:
        raise ValueError("has no type")
    if any(d < 0 for d in dims):
        raise ValueError(f"has negative dimensions: {list(dims)}")
    count = math.prod(dims)
    return count, count if kind == ir.DataType.STRING else -(-count * kind.bitwidth // 8)


def _tensor(tensor: onnx.TensorProto, findings: _Findings, where: str = "") -> None:
    label = f"tensor {tensor.name}" if tensor.name or not where else where
    try:
        count, size = _size(tensor.data_type, tensor.dims)
    except ValueError as error:
        findings.add(f"{label} {error}")
        return
    if uses_external_data(tensor):
        if problem := _external(tensor, size, findings):
            findings.add(f"{label}: {problem}")
        return
    kind = ir.DataType(tensor.data_type)
    if tensor.HasField("raw_data"):
        stored, expected, unit = len(tensor.raw_data), size, "bytes"
        if kind == ir.DataType.STRING:
            findings.add(f"{label} holds strings as raw data, which have no form")
            return
    else:
        stored, unit = len(getattr(tensor, _FIELDS.get(kind.name, "int32_data"))), "values"
        packed = max(8 // kind.bitwidth, 1) if kind != ir.DataType.STRING else 1
        expected = 2 * count if kind.name.startswith("COMPLEX") else -(-count // packed)
    if stored != expected:
        findings.add(f"{label} of type {kind.name} and shape {list(tensor.dims)} must hold {expected} {unit}, and has {stored}")


def _external(tensor: onnx.TensorProto, size: int, findings: _Findings) -> str | None:
    """Describe a problem of a tensor's external data, which must have ``size`` bytes, else None."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if not isinstance(location, str):
        return f"external data {location[:80]!r} has a name that is not UTF-8"
    if findings.folder is None:
        return f"its data is in the file {location!r}, and a model in memory has no folder; give the model's path"
    if tensor.data_type == onnx.TensorProto.STRING:
        return "strings cannot be external data"
    try:
        offset, length = (int(entries.get(key) or default) for key, default in (("offset", 0), ("length", size)))
    except ValueError:
        return f"offset {entries.get('offset', '')[:40]!r} and length {entries.get('length', '')[:40]!r} must be whole numbers"
    if offset < 0 or length != size:
        return f"needs {size} bytes of external data, and is said to have {length} at offset {offset}"
    file = findings.folder / location
    try:
        contained = any(map(file.resolve().is_relative_to, findings.allowed))
        if location and not os.path.isabs(location) and contained and file.is_file():
            file_bytes = findings.files.setdefault(file, file.stat().st_size)
            findings.external_bytes += size
            return None if offset + size <= file_bytes else f"{file} has {file_bytes} bytes, but the tensor ends at {offset + size}"
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte in the name, a name that is too long
        return f"external data {location[:80]!r} cannot be found: {error}"
    if not location or os.path.isabs(location) or not contained:
        link = " (a link leads there; put the file itself beside the model)" if location and file.is_symlink() else ""
        return f"external data {location[:80]!r} lies outside {findings.folder.resolve()}{link}"
    return f"external data file {file} is missing; keep it beside the model"


def _sparse(sparse: onnx.SparseTensorProto, findings: _Findings, where: str = "") -> None:
    label = f"sparse tensor {sparse.values.name}" if sparse.values.name or not where else where
    before = len(findings.problems)
    for part_name, tensor in (("values", sparse.values), ("indices", sparse.indices)):
        _tensor(tensor, findings, f"{part_name} of {label}")
        if uses_external_data(tensor):
            findings.add(f"{part_name} of {label}: sparse tensors cannot be external data")
    if len(findings.problems) > before:
        return
    try:
        count, size = _size(sparse.values.data_type, sparse.dims)
    except ValueError as error:
        findings.add(f"{label} {error}")
        return
    if size > LARGEST_CONSTANT:
        findings.add(f"{label} of shape {list(sparse.dims)} stands for {size:.3g} bytes, {_TOO_LARGE}")
        return
    number, rank = math.prod(sparse.values.dims), len(sparse.dims)
    form = list(sparse.indices.dims)
    if len(sparse.values.dims) != 1 or sparse.indices.data_type != onnx.TensorProto.INT64 or form not in ([number], [number, rank]):
        findings.add(f"{label}: {number} values need as many int64 indices, flat or of rank {rank}, and have {form}")
        return
    indices = onnx.numpy_helper.to_array(sparse.indices)
    most = count if indices.ndim == 1 else np.asarray(sparse.dims)
    if ((indices < 0) | (indices >= most)).any():
        findings.add(f"{label} has indices beyond its shape {list(sparse.dims)}")
