"""Sphinx settings of ``make docs``: the pages of the repository as a website."""

project = "LlamaRec"
author = "the contributors of LlamaRec"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
include_patterns = ["docs/**", "*.md"]
exclude_patterns = ["docs/_build"]
root_doc = "docs/index"
html_theme = "furo"
html_title = "LlamaRec"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4  # as on GitHub
myst_fence_as_directive = ["mermaid"]
