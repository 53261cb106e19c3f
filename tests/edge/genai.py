"""Writes a small model as transformers does, in a Python of its own; see `tests.edge.test_genai`.

    python genai.py FOLDER

``FOLDER/weights.npz``, if it is there, has arrays by the names of the parameters; the others are random, with a fixed seed.
``FOLDER/made.json`` is ``{"class", "options"}`` of a configuration of transformers. The model goes to ``FOLDER/hf``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    folder = Path(sys.argv[1])
    made = json.loads((folder / "made.json").read_text())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, made["class"])(**made["options"])).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    if (folder / "weights.npz").exists():
        weights = {name: torch.tensor(array) for name, array in np.load(folder / "weights.npz").items()}
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.missing_keys, missing
        assert not missing.unexpected_keys, missing
    model.save_pretrained(folder / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.save_pretrained(folder / "hf")


if __name__ == "__main__":
    main()
