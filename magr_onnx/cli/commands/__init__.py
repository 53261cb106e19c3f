"""One command a file: a function that parses, calls the Python interface and prints, and its examples in ``EPILOG``.

**A new command**: a file here, and its place in `COMMANDS`.
"""

from magr_onnx.cli.commands import demo, inspect, olive_config, optimize, passes, presets, report, validate, verify

COMMANDS = {
    "optimize": optimize,
    "inspect": inspect,
    "validate": validate,
    "verify": verify,
    "report": report,
    "passes": passes,
    "presets": presets,
    "olive-config": olive_config,
    "demo": demo,
}
"""Modules by the name of their command, which (with _ for -) is also the name of the function, in the order of the help."""
