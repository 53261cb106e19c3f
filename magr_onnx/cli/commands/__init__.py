"""Commands, one per file: a function that parses, calls the Python interface and prints, and examples in ``EPILOG``.

To add a command, add its file here and its line to `COMMANDS`.
"""

COMMANDS = {
    "optimize": "Quantize the linear layers and convolutions of a model, and report what happened to every one.",
    "inspect": "List linear layers with shapes and ranges, and what would be left alone and why.",
    "validate": "Compare a float and a quantized model on real inputs, at each arithmetic onnxruntime may use.",
    "generate": "Generate text greedily with a model, and with its quantized form: tokens as they come, and where they differ.",
    "verify": "Prove that no input of a model overflows an integer accumulator, or show one that does.",
    "report": "Make a page of a report, or of two side by side; prints where it is.",
    "passes": "List the passes a pipeline may name, with their options and defaults.",
    "presets": "List the presets, what they are for and what they set.",
    "olive-config": "Print the package configuration that gives Olive the pass OnnxMagr beside all its own.",
    "demo": "Quantize the bundled language model and print its perplexity before and after: about 20 seconds on a laptop.",
}
"""Commands in the order of the help, with the first lines of their docstrings, so that listing them imports none. A command has the name of
its module and function, with - for _."""
