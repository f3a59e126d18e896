"""Sphinx: one build command, ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.

Warnings are errors there, unresolved references are warnings here, and nothing is fetched when a page is viewed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: the gallery states one thread and means it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sphinxcontrib.katex import katex_version

import ddnref
from ddnref.examples._look import LOOK

project = "ddnref"
author = "the ddnref authors"
copyright = author
release = version = ddnref.__version__
language = "en-GB"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.katex",
    "_directives",
    "_history",
]
source_suffix = {".rst": "restructuredtext"}
templates_path = ["_templates"]
exclude_patterns = ["_build", "sg_execution_times.rst", "auto_gallery/sg_execution_times.rst"]
default_role = "link-or-literal"
add_module_names = False

# --- references: what cannot be resolved is an error -----------------------------------------------------------

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(collections|typing|numpy|torch|jax)\..*")]
linkcheck_ignore = [r"https?://"]  # no network in CI; internal references are checked by the build itself
linkcheck_anchors = True

# --- reference pages ---------------------------------------------------------------------------------------------

autosummary_generate = True
autosummary_imported_members = False
autodoc_typehints = "none"
FRAMEWORKS = ("torch", "jax", "autograd", "tensorflow", "dask")
autodoc_mock_imports = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]
if "jax" in autodoc_mock_imports:
    autodoc_mock_imports.append("ddnref.interop._jax_linear")  # it registers a primitive, which no mock takes
numpydoc_show_class_members = False
numpydoc_validation_checks: set[str] = set()

# --- mathematics, from files beside the pages --------------------------------------------------------------------

KATEX = "0.16.22"  # what _static/katex holds: style sheet and fonts of the KaTeX whose script the extension brings
if katex_version != KATEX:
    raise RuntimeError(f"sphinxcontrib-katex brings KaTeX {katex_version}, docs/_static/katex holds {KATEX}.")
katex_css_path = "katex/katex.min.css"
katex_options = r'macros: {"\\diag": "\\operatorname{diag}", "\\sym": "\\operatorname{sym}"}, throwOnError: true'

# --- gallery: executed at every build, no example may fail --------------------------------------------------------


def reset_matplotlib(gallery_conf: dict[str, Any], name: str) -> None:  # noqa: ARG001
    """One look for every picture, that of the report too."""
    import matplotlib as mpl

    mpl.rcParams.update(LOOK)


sphinx_gallery_conf = {
    "examples_dirs": "../ddnref/examples",
    "gallery_dirs": "auto_gallery",
    "backreferences_dir": "auto_gallery/backreferences",  # for the groups of gallery.rst
    "thumbnail_size": (600, 420),
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"^_",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": False,
    "only_warn_on_example_error": False,
    "reset_modules": ("matplotlib", reset_matplotlib),
    "image_srcset": ["2x"],
    "remove_config_comments": True,
    "min_reported_time": 1e9,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "plot_gallery": "True",
}
suppress_warnings = ["config.cache"]  # the function above cannot be pickled

# --- the look ----------------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "ddnref"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "ddnref"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["footer_licence"],
    "footer_center": [],
    "footer_end": ["theme-version"],
    "show_prev_next": True,
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {page: [] for page in ("*", "auto_gallery/*")}  # lists of names help in the reference only
html_sidebars["api"] = html_sidebars["generated/*"] = ["sidebar-nav-bs"]
