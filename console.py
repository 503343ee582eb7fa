"""Commands of an installed copy, ``llamarec-train-retriever`` and the others.

``pip install .`` puts everything into one package, ``llamarec``, so that our folder ``datasets``
does not replace Hugging Face's library. A command runs its script as ``python SCRIPT.py`` would:
with the folder of the script first on the path.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command is named after."""
    folder, command = Path(__file__).parent, Path(sys.argv[0]).stem
    script = command.removeprefix("llamarec-").replace("-", "_")
    names = {"augment": "augment_data", "export": "export_run"}
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / f"{names.get(script, script)}.py"), run_name="__main__")
