"""Write a finished run as files that other programs read without this project.

Example:
    python export_run.py --run experiments/smollm2-135m/games --output exported
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli import Parser, add_run_flags, run_main
from errors import UserError
from process import check_single_process
from recipes.runs import check_own_folder, data_config, finished_settings, load_data
from storage import atomic_folder, remove_left_behind

README = "README.md"
TITLE = "# An exported run\n"  # identifies an earlier export


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_run_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, then write everything."""
    flags = parse(argv)
    check_single_process()
    run_dir, output = Path(flags.run), Path(flags.output)
    settings = finished_settings(run_dir)
    check_output(output, overwrite=flags.overwrite)
    data = load_data(data_config(run_dir, settings, flags.data_root, flags.cache_root))
    # torch takes seconds to import, so this comes after all checks.
    from recipes.export import export_run

    remove_left_behind(output)
    with atomic_folder(output) as folder:
        export_run(run_dir, settings, data, flags.llm_base_model, folder)
    print(f"written to {output}; its {README} says how to load each file")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export.

    Raises:
        UserError: the folder holds something else, or an export without ``overwrite``.
    """
    readme = output / README
    is_ours = readme.is_file() and readme.read_text(errors="replace").startswith(TITLE)
    check_own_folder(output, is_ours=is_ours)
    if is_ours and not overwrite:
        raise UserError(f"--output {output} holds an export: replace it with --overwrite")


if __name__ == "__main__":
    run_main(main, can_resume=False)
