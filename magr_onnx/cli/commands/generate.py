"""`onnx-magr generate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose, option
from magr_onnx.workflow import generate as generation

EPILOG = """[bold]Examples[/bold]

onnx-magr generate llama/ llama-int4/ --prompt "It was a bright cold day"

onnx-magr generate model.onnx --tokenizer tokenizer.json --max-tokens 64 < prompt.txt

onnx-magr generate llama/ llama-int4/ --chat --prompt "Why is the sky blue?" """


def generate(
    model: Annotated[Path, typer.Argument(help="Language model, or its folder.", show_default=False)],
    quantized: Annotated[Path | None, typer.Argument(help="Its quantized form, to compare with.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text; token ids without a tokenizer. Default: standard input.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = generation.MOST,
    chat: Annotated[bool, typer.Option("--chat", help="Frame the prompt by the model's chat template.")] = False,
    tokenizer: Annotated[Path | None, option("tokenizer")] = None,
    provider: Annotated[str, option("provider")] = "cpu",
    custom_ops: Annotated[list[Path] | None, option("custom_ops")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate text greedily with a model, and with its quantized form: tokens as they come, and where they differ."""
    shown: list[str] = []

    def show(name: str, _: int, text: str) -> None:
        if name not in shown:
            sys.stdout.write(f"{chr(10) * 2 if shown else ''}{name}:\n")
            shown.append(name)
        sys.stdout.write(text)
        sys.stdout.flush()

    result = generation.generate(
        model,
        quantized,
        prompt=sys.stdin.read().strip() if prompt is None else prompt,
        max_tokens=max_tokens,
        chat=chat,
        tokenizer=tokenizer,
        provider=provider,
        custom_ops=custom_ops or (),
        on_token=None if as_json or quiet else show,
    )
    if shown:
        sys.stdout.write("\n\n")
    console.show(dataclasses.asdict(result), _summary(result), as_json, quiet)


def _summary(result: generation.Generation) -> str:
    """A line a model, and where the two differ."""
    lines = []
    for each in result.results:
        speed = "" if each.tokens_per_second is None else f", {each.tokens_per_second:.1f} tokens/s"
        ends = {"context": "; its context is full", "failure": "; it fails on more", "end token": "; it ended the text", "length": ""}
        lines.append(f"{each.model}: {len(each.tokens)} tokens, the first in {each.first_seconds:.2f} s{speed}{ends[each.end]}")
    if len(result.results) == 2:
        count, first = len(result.results[0].tokens), result.differs
        same = f"all {count} tokens are the same"
        lines.append(same if first is None else f"the first {first} tokens are the same, and number {first + 1} differs")
    return "\n".join(lines)
