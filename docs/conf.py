"""How the pages here become a site: ``sphinx-build -W -n docs build/site``. Nothing is fetched, and the site opens offline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import magr_onnx

project = "onnx-magr"
author = "the authors of onnx-magr"
copyright = "the authors of onnx-magr, Apache 2.0"
release = version = magr_onnx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.graphviz",
    "sphinx_copybutton",
    "mathml",
    "generated",
    "sources",
]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["extensions"]
default_role = "py:obj"

graphviz_output_format = "svg"

html_theme = "furo"
html_title = f"onnx-magr {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
copybutton_prompt_text = "$ "
html_copy_source = False
html_show_sphinx = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_use_ivar = True  # a dataclass's fields are described in its docstring, once
napoleon_numpy_docstring = False

# References that are strict otherwise: types of other packages, and our own that have no page because nobody makes them by hand.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|os|pathlib|numpy|npt|ir|onnx|onnx_ir|torch|np|typing)\b.*"),
    ("py:.*", r"magr_onnx\.[a-z_]+(\..*)?"),  # internal modules; what `magr_onnx` itself exports has its place in the reference
    ("py:class", r"dict\[str"),
    ("py:exc", r"\w+"),
    ("py:obj", r"(?!magr_onnx\b)[\w.]+"),  # names that docstrings take from their own module
]
