"""No content of a file is executed, every download is pinned or local, and secrets stay secret."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT, run_script

SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "data")
]
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
OPTIONS = {"allow_pickle", "trust_remote_code", "shell"}  # only False is allowed
# Functions that download, or run a downloaded file, unless this option is passed.
REQUIRED_OPTIONS = {
    "np.load": "allow_pickle",
    "numpy.load": "allow_pickle",
    "hf_hub_download": "revision",
    "snapshot_download": "revision",
}
NETWORK = {"requests", "httpx", "aiohttp", "urllib.request", "http.client", "socket", "ftplib"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """Names of all modules that a source imports, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def dangers(tree: ast.Module) -> list[str]:
    """Imports, calls and options that execute the content of a file or download what may change."""
    found = [name for name in imports(tree) if name.partition(".")[0] in MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        if name in CALLS:
            found.append(name)
        found += [f"{name}({x})" for x in OPTIONS & options.keys() if options[x] != "False"]
        required = REQUIRED_OPTIONS.get(name)
        if required and required not in options:
            found.append(f"{name} without {required}")
    return found


def test_no_source_executes_the_content_of_a_file():
    assert len(SOURCES) > 60
    assert {str(path): dangers(parse(path)) for path in SOURCES if dangers(parse(path))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "torch.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=y)",
        "snapshot_download(name)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_dangers_are_noticed(source: str):
    assert dangers(ast.parse(source))


def test_only_one_module_uses_the_network():
    """Besides it, the hub's library and pip download, in ``model.hub`` and ``downloads``."""
    using = [path for path in SOURCES if imports(parse(path)) & NETWORK]
    assert using == [ROOT / "downloads.py"]
    hub = [path for path in SOURCES if any("huggingface_hub" in x for x in imports(parse(path)))]
    assert hub == [ROOT / "model" / "hub.py"]


def test_models_are_loaded_from_local_files():
    """Where a name might be given, only the modules that check it may download."""
    calls = [
        (path.relative_to(ROOT), node)
        for path in SOURCES
        if path.parts[len(ROOT.parts)] != "benchmarks"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 5
    for path, node in calls:
        options = {word.arg for word in node.keywords}
        assert "local_files_only" in options or None in options, f"{path}:{node.lineno}"


SECRET = "5ec2e7"


def test_secrets_stay_secret_and_wandb_is_not_imported(
    toy_flags: list, tiny_llama: Path, tmp_path: Path
):
    """Nothing that a run prints or writes contains a secret from the environment."""
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    url = f"http://user:{SECRET}@127.0.0.1:9"
    env = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), SECRET)
    env |= {"HF_ENDPOINT": url, "PIP_INDEX_URL": url, "https_proxy": url, "http_proxy": url}
    env |= {"PYTHONPATH": str(tmp_path), "PIP_RETRIES": "0"}
    run = tmp_path / "retriever"
    steps = ["--device", "cpu", "--max_steps", 2]
    retriever = ["train_retriever.py", *toy_flags, *steps, "--export_root", run]
    ranker = [
        "train_ranker.py", "--llm_retrieved_path", run, "--llm_base_model", tiny_llama, *steps,
        "--export_root", tmp_path / "ranker",
    ]  # fmt: skip
    for command in (retriever, ranker):
        done = run_script(*command, env=env)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    # Nor does the message about a download that fails.
    for command in (
        ["train_retriever.py", "--dataset_code", "ml-100k"],
        ["train_retriever.py", "--dataset_code", "ml-100k-classic"],
        [*ranker, "--llm_base_model", "someone/model", "--llm_cache_dir", tmp_path],
    ):
        done = run_script(
            *command, "--data_root", tmp_path / "data", env=env | {"HF_HUB_OFFLINE": "0"}
        )
        assert done.returncode == 2 and "download" in done.stderr
        assert SECRET not in done.stdout + done.stderr, done.stderr
    (tmp_path / "wandb.py").unlink()
    assert len(list(tmp_path.rglob("config.json"))) == 2
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


# Dependencies -----------------------------------------------------------------------------------


def test_locked_versions_are_within_bounds_and_have_hashes():
    pin = re.compile(
        r"^([\w.-]+)==(\S+) \\((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)", re.MULTILINE
    )
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {name: version for name, version, _ in pin.findall(lock)}
    entries = [line for line in lock.splitlines() if not line.startswith(("#", " "))]
    assert len(locked) == len(entries) > 50  # each with hashes
    locked["torch"] = re.findall(r"pip install torch==(\S+)", lock)[0]  # which the comment installs
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            asked = Requirement(line)
            version = locked[asked.name.lower().replace("_", "-")]
            assert asked.specifier.contains(version), (line, version)
