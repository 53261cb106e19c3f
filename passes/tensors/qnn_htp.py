"""Qualcomm's NPU (Hexagon Tensor Processor) through onnxruntime's QNN provider."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="qnn-htp",
    source="operators of onnxruntime-qnn 2.7 (docs/execution_providers/QNN-ExecutionProvider.md); ranges of Sigmoid, Softmax and Tanh as "
    "in onnxruntime's quantization/execution_providers/qnn/quant_config.py; run on Qualcomm's emulator (tests/edge/test_npu.py)",
    computed={
        **operators(
            "Abs Add AveragePool BatchNormalization Clip Concat Conv ConvTranspose Div Elu Exp Gelu Gemm GlobalAveragePool GlobalMaxPool "
            "HardSigmoid HardSwish InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul Max Min Mul "
            "Neg PRelu Pow RMSNormalization ReduceMax ReduceMean ReduceMin ReduceSum Relu Sigmoid SimplifiedLayerNormalization Softmax "
            "Sqrt Sub Sum Tanh"
        ),
        "Resize": {"mode": ("linear", "cubic")},
    },
    moved={
        **operators(
            "DepthToSpace Expand Flatten Gather Identity MaxPool Pad Reshape Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze"
        ),
        "Resize": {"mode": (None, "nearest")},
    },
    ranges={"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)},
    types=("uint8", "uint16"),
    narrow={"MatMul": 1},
    gemm_only=True,
    int4="stored",
    fixed_shapes=True,
)
