"""One command a file: a function that parses, calls the Python interface and prints, and its examples in ``EPILOG``.

**A new command**: a file here, and its line in `COMMANDS`.
"""

COMMANDS = {
    "optimize": "Quantize the linear layers and convolutions of a model, and report what happened to every one.",
    "inspect": "List linear layers with shapes and ranges, and what would be left alone and why.",
    "validate": "Compare a float and a quantized model on real inputs, at each arithmetic onnxruntime may use.",
    "verify": "Prove that no input of a model overflows an integer accumulator, or show one that does.",
    "report": "Make a page of a report, or of two side by side; prints where it is.",
    "passes": "List the passes a pipeline may name, with their options and defaults.",
    "presets": "List the presets, what they are for and what they set.",
    "olive-config": "Print the package configuration that gives Olive the pass OnnxMagr beside all its own.",
    "demo": "Quantize the bundled language model and print its perplexity before and after: about 20 seconds on a laptop.",
}
"""Commands in the order of the help, each with the first line of its docstring, so that a list of them imports none. The name (with _ for
-) is that of the module and of the function in it."""
