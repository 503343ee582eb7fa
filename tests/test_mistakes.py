"""Mistakes, and what the programs say to them.

Every row of the table is a command as a user types it in a working directory that holds

    log.csv, titles.csv       a small data set with 60 users and 40 items
    data/cache/               where it is preprocessed already
    experiments/lru/custom/   a finished run of train_retriever.py
    model/                    a tiny language model

and, where the mistake is in a file, the files that are changed first. Each ends with exit status 2
and exactly one line on stderr, ``error: ...``, that holds the words given; nothing in the working
directory is new, gone or changed afterwards.
"""

import gzip
import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

import train_retriever
from config import UserError, cuda_driver
from tests.conftest import run_script
from trainer import folder

Content = str | bytes | Callable[[bytes], bytes] | None


class Mistake(NamedTuple):
    """One row.

    Attributes:
        what: the mistake, which names the test.
        command: the command line; ``{hub}`` stands for a server that answers like the hub.
        says: words that the message holds.
        files: what a file holds instead, or a function of what it holds; None takes the file or
            folder away, a name that ends in a slash is an empty folder.
        env: environment variables.
    """

    what: str
    command: str
    says: str
    files: dict[str, Content] = {}  # noqa: RUF012
    env: dict[str, str] = {}  # noqa: RUF012


RETRIEVE = "train_retriever.py --dataset_code games --data_root absent"
RANK = "train_ranker.py --dataset_code games --data_root absent"
CUSTOM = (
    "train_retriever.py --dataset_code custom --interactions log.csv --items titles.csv "
    "--device cpu --export_root run"
)
MOVIES = "train_retriever.py --dataset_code ml-100k"
BEAUTY = "train_retriever.py --dataset_code beauty"
MODEL = (
    "train_ranker.py --llm_retrieved_path experiments/lru/custom --llm_base_model model "
    "--device cpu --export_root run"
)
CANDIDATES = f"{MODEL} --llm_base_model ./none"  # so that nothing begins that takes long

FLAGS = [
    Mistake("unknown flag", f"{RETRIEVE} --learning_rate 0.1", "--learning_rate"),
    Mistake("abbreviated flag", "train_retriever.py --dataset games", "--dataset"),
    Mistake("word without a flag", "train_ranker.py games", "games"),
    Mistake("flag without a value", f"{RETRIEVE} --lr", "--lr: expected one argument"),
    Mistake("list without a value", f"{RETRIEVE} --metric_ks", "--metric_ks: expected at least"),
    Mistake("no number", f"{RETRIEVE} --lr fast", "--lr: 'fast' is not a number"),
    Mistake("no whole number", f"{RETRIEVE} --max_len 2.5", "--max_len/--bert_max_len: '2.5'"),
    Mistake("too low", f"{RETRIEVE} --hidden_units 0", "--hidden_units/--bert_hidden_units: 0"),
    Mistake("negative", f"{RETRIEVE} --lr -1", "--lr: -1 is out of range"),
    Mistake("too high", f"{RETRIEVE} --dropout 1.0", "must be below 1.0"),
    Mistake("far too high", f"{RETRIEVE} --seed {10**30}", "--seed: 1000000"),
    Mistake("NaN", f"{RETRIEVE} --lr nan", "--lr: 'nan' is not a number"),
    Mistake("NaN where all is allowed", f"{RETRIEVE} --min_rating nan", "--min_rating: 'nan'"),
    Mistake("infinite", f"{RETRIEVE} --weight_decay inf", "--weight_decay: inf is out of range"),
    Mistake("no boolean", f"{RETRIEVE} --use_wandb perhaps", "'perhaps' is neither true nor false"),
    Mistake("no choice", f"{RETRIEVE} --model_code gru", "--model_code: invalid choice: 'gru'"),
    Mistake("no data set", "train_retriever.py --dataset_code netflix", "beauty"),
    Mistake("no data set named", "train_retriever.py", "--dataset_code is missing"),
    Mistake("no data set named to the ranker", "train_ranker.py", "--dataset_code is missing"),
    Mistake("no device", f"{RETRIEVE} --device tpu", "--device: invalid choice: 'tpu'"),
    Mistake("CUDA absent", f"{RETRIEVE} --device cuda", "use --device cpu"),
    Mistake("CUDA absent for the ranker", f"{RANK} --device cuda", "use --device cpu"),
    Mistake("several processes", RETRIEVE, "start it with python", env={"WORLD_SIZE": "2"}),
    Mistake("no metric", f"{RETRIEVE} --best_metric Accuracy@10", "--best_metric Accuracy@10"),
    Mistake("cut-off with a zero", f"{RETRIEVE} --best_metric NDCG@010", "--best_metric NDCG@010"),
    Mistake("one candidate", f"{RETRIEVE} --num_candidates 1", "--num_candidates: 1 is out of ran"),
    Mistake("metric without cut-off", f"{RETRIEVE} --best_metric Recall", "a cut-off, Recall@10"),
    Mistake("cut-off not computed", f"{RETRIEVE} --best_metric NDCG@7", "7 is not among"),
    Mistake("cut-off 0", f"{RETRIEVE} --metric_ks 0", "--metric_ks: 0 is out of range"),
    Mistake("cut-off in words", f"{RETRIEVE} --metric_ks 5 ten", "--metric_ks: 'ten'"),
    Mistake("resume and replace", f"{RETRIEVE} --resume true --overwrite true", "choose one"),
    Mistake("users too short to split", f"{RETRIEVE} --min_uc 2", "--min_uc 2: a user needs 3"),
    Mistake("windows of no item", f"{RETRIEVE} --sliding_window_size 0.001", "less than one item"),
    Mistake("heads", f"{RETRIEVE} --model_code sas --num_heads 5", "--num_heads 5 does not divide"),
    Mistake("preset", f"{RETRIEVE} --preset best", "--preset: invalid choice: 'best'"),
    Mistake("no samples", f"{RETRIEVE} --negatives 0", "--negatives: 0 is out of range"),
    Mistake("grid out of range", f"{RETRIEVE} --search_dropout 0.1 1", "--search_dropout: 1"),
    Mistake("rank 0", f"{RANK} --lora_r 0", "--lora_r: 0 is out of range"),
    Mistake("ranker's cut-offs", f"{RANK} --rerank_metric_ks 5", "--rerank_best_metric NDCG@10"),
    Mistake("third way", f"{RANK} --gradient_checkpointing maybe", "--gradient_checkpointing"),
    Mistake("template without candidates", f"{RANK} --llm_input_template {{}}", "needs {} twice"),
    Mistake(
        "loss over letters and over all",
        f"{RANK} --response_loss letters --llm_train_on_inputs true",
        "--response_loss letters leaves no loss for --llm_train_on_inputs true",
    ),
    Mistake("idle flag and a mistake", f"{RETRIEVE} --lora_r 8 --min_uc 2", "--min_uc 2: a user"),
]  # fmt: skip

HEADER = "user,item,timestamp\n"
RATED = "user,item,timestamp,rating\n"
ONE = "item,title\n1,One\n"


def parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def endless_parquet() -> bytes:
    """A billion rows that hold nothing, in some kilobytes."""
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    part = pa.table({name: pa.nulls(10**8) for name in ("user", "item", "timestamp")})
    with parquet.ParquetWriter(buffer, part.schema) as writer:
        for _ in range(10):
            writer.write_table(part, row_group_size=10**8)
    return buffer.getvalue()


def log(what: str, content: Content, says: str, name: str = "log.csv") -> Mistake:
    """A mistake in the file of interactions, which has another name where the format matters."""
    command = CUSTOM.replace("log.csv", name)
    return Mistake(f"log: {what}", command, says, {name: content})


CUSTOM_DATA = [
    Mistake("no files", "train_retriever.py --dataset_code custom", "needs both --interactions"),
    Mistake("one file", f"{RETRIEVE} --dataset_code custom --items titles.csv", "needs both"),
    Mistake("files of no use", f"{RETRIEVE} --interactions log.csv", "--dataset_code custom needs"),
    Mistake("log absent", f"{CUSTOM} --interactions no.csv", "cannot read no.csv: No such file"),
    Mistake("titles absent", f"{CUSTOM} --items no.csv", "cannot read no.csv: No such file"),
    log("folder", None, "cannot read dir.csv: Is a directory", "dir.csv/"),
    log("unknown format", "x", "log.xlsx: its name must end in .csv", "log.xlsx"),
    log("empty", "", "log.csv is empty"),
    log("header alone", HEADER, "log.csv is empty"),
    log("no timestamps", "user,item\na,1\n", "log.csv lacks the column timestamp (or time"),
    log("other names", "who,what,when\na,1,1\n", "lacks the column user (or user_id, userId, uid)"),
    log("column twice", "user:a,user:b,item,timestamp\na,b,1,1\n", "log.csv has two columns user"),
    log("another separator", HEADER.replace(",", ";") + "a;1;1\n", "lacks the column user"),
    log("day", HEADER + "a,1,1\na,2,Monday\n", "log.csv row 3: timestamp 'Monday' is not a number"),
    log("NaN", HEADER + "a,1,nan\n", "log.csv row 2: timestamp 'nan' is not a number"),
    log("infinite time", HEADER + "a,1,inf\n", "log.csv row 2: timestamp 'inf'"),
    log("no time", HEADER + "a,1,\n", "log.csv row 2: timestamp '' is not a number"),
    log("time with 400 digits", HEADER + f"a,1,{'9' * 400}\n", "log.csv row 2: timestamp '999"),
    log("rating in words", RATED + "a,1,1,good\n", "log.csv row 2: rating 'good'"),
    log("rating beyond all numbers", RATED + "a,1,1,1e999\n", "log.csv row 2: rating '1e999'"),
    log("hidden signs", HEADER + 'a,1,"x\n\x1b[2J"\n', r"timestamp 'x\n\x1b[2J' is not a number"),
    log("no user", HEADER + "a,1,1\n,2,2\n", "log.csv row 3: user is empty"),
    log("no item", HEADER + "a,,1\n", "log.csv row 2: item is empty"),
    log("short row", HEADER + "a,1,1\na\n", "log.csv row 3: item is empty"),
    log("long row", HEADER + "a,1,1\na,1,1,1\n", "Expected 3 fields in line 3, saw 4"),
    log("long rows", HEADER + "a,1,1,1\na,2,1,1\n", "more fields than its first line"),
    log("open quote", HEADER + 'a,"1,1\n', "cannot read log.csv: "),
    log("noise", bytes(range(256)) * 9, "log.csv"),
    log("UTF-16", (HEADER + "a,1,1\n").encode("utf-16"), "log.csv: it is not UTF-8 text"),
    log("no Parquet", HEADER + "a,1,1\n", "cannot read log.parquet: ", "log.parquet"),
    log(
        "truncated Parquet",
        lambda _: parquet(pd.DataFrame({"user": ["a"], "item": ["1"], "timestamp": [1]}))[:-9],
        "cannot read log.parquet: ",
        "log.parquet",
    ),
    log("endless Parquet", lambda _: endless_parquet(), "unpacks to more than", "log.parquet"),
    log("tabs expected", HEADER + "a,1,1\n", "log.inter lacks the column user", "log.inter"),
    log("too few interactions", HEADER + "a,i1,1\n", "lower --min_uc, --min_sc or --min_rating"),
    Mistake("nothing rated so high", f"{CUSTOM} --min_rating 6", "lower --min_uc",
            {"log.csv": RATED + "".join(f"a,i{n},1,5\n" for n in range(9))}),
    Mistake("no ratings", f"{CUSTOM} --min_rating 3", "--min_rating 3: custom has no column of"),
    Mistake("titles empty", CUSTOM, "titles.csv is empty", {"titles.csv": ""}),
    Mistake("titles without header", CUSTOM, "titles.csv lacks the column item",
            {"titles.csv": "i1,One\ni2,Two\n"}),
    Mistake("no title column", CUSTOM, "titles.csv lacks the column title (or name",
            {"titles.csv": "item\ni1\n"}),
    Mistake("items without title", CUSTOM, "titles.csv has no title for 40 of the items in log.csv",
            {"titles.csv": ONE}),
    Mistake("blank title", CUSTOM, "no title for 1 of the items in log.csv, the first is 'i7'",
            {"titles.csv": lambda x: x.replace(b'"The i7 Story, part 7"', b'" \t "')}),
]  # fmt: skip

FILMS = "movieId,title,genres\n" + "".join(f"{i},Film {i} (1999),Drama\n" for i in range(6))
RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{u},{i},5,{u + i}\n" for u in range(6) for i in range(6)
)
REVIEWS = "u,i1,5.0,1\n"
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def ratings(what: str, content: str, says: str) -> Mistake:
    files = {"data/ml-100k/ratings.csv": content, "data/ml-100k/movies.csv": FILMS}
    return Mistake(f"MovieLens: {what}", MOVIES, says, files)


def films(what: str, content: str, says: str) -> Mistake:
    files = {"data/ml-100k/ratings.csv": RATINGS, "data/ml-100k/movies.csv": content}
    return Mistake(f"MovieLens: {what}", MOVIES, says, files)


def metadata(what: str, content: bytes, says: str) -> Mistake:
    files = {
        "data/beauty/ratings_Beauty.csv": REVIEWS, "data/beauty/meta_Beauty.json.gz": content,
    }  # fmt: skip
    return Mistake(f"Amazon: {what}", BEAUTY, says, files)


RAW_DATA = [
    Mistake("MovieLens: no network", MOVIES, "fetch https://files.grouplens.org", env=NO_NETWORK),
    Mistake("Amazon: no network", BEAUTY, "put it at data/beauty/ratings_Beauty", env=NO_NETWORK),
    Mistake("data root is a file", f"{MOVIES} --data_root log.csv", "log.csv/ml-100k",
            env=NO_NETWORK),
    ratings("no timestamps", RATINGS.replace("timestamp", "when"), "lacks the column timestamp"),
    ratings("a day", RATINGS + "7,1,5,Monday\n", "ratings.csv row 38: timestamp 'Monday'"),
    ratings("rating", RATINGS + "7,1,good,1\n", "ratings.csv row 38: rating 'good'"),
    ratings("infinite time", RATINGS + "7,1,5,inf\n", "ratings.csv row 38: timestamp 'inf'"),
    ratings("no user", RATINGS + ",1,5,1\n", "ratings.csv row 38: user is empty"),
    ratings("empty", "", "ratings.csv is empty"),
    ratings("header alone", RATINGS.splitlines()[0] + "\n", "ratings.csv is empty"),
    ratings("long row", RATINGS + "1,2,3,4,5,6,7\n", "Expected 4 fields in line 38, saw 7"),
    ratings("truncated", RATINGS[:200], "no user has 5 interactions"),
    films("no films", "", "movies.csv is empty"),
    films("no titles", FILMS.replace("title", "name"), "movies.csv lacks the column title"),
    films("not UTF-8", FILMS + "9,\udcff,\n", "movies.csv: it is not UTF-8 text"),
    Mistake("MovieLens 1998: short row", "train_retriever.py --dataset_code ml-100k-classic",
            "ml-100k.inter row 3: timestamp '' is not a number",
            {"data/ml-100k-classic/ml-100k.inter": "user_id\titem_id\trating\ttimestamp\n"
             "1\t1\t1\t1\n1\t2\n", "data/ml-100k-classic/ml-100k.item": "x"}),
    metadata("truncated", gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n" * 50)[:-12], "no whole"),
    metadata("no gzip", b"not gzip at all", "meta_Beauty.json.gz is no whole gzip file"),
    metadata("half a record", gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n{'asin': 'i2', 't\n"),
             "meta_Beauty.json.gz row 2: no record"),
    metadata("no record", gzip.compress(b"[1, 2]\n"), "row 1: no record with asin and title"),
    metadata("no asin", gzip.compress(b"{'title': 'x'}\n"), "row 1: no record with asin and title"),
    metadata("a program", gzip.compress(b"open('log.csv', 'w')\n"), "row 1: no record"),
    metadata("brackets without end", gzip.compress(b"[" * 100_000 + b"\n"), "row 1: no record"),
    metadata("empty", gzip.compress(b""), "meta_Beauty.json.gz is empty"),
    metadata("not UTF-8", gzip.compress(b"\xff\xfe\x00\n"), "row 1 is not UTF-8 text"),
    metadata("endless line", gzip.compress(b" " * (17 << 20)), "row 1: longer than 16,777,216"),
    Mistake("Amazon: three columns", BEAUTY, "has 3 columns, it needs user, item, rating",
            {"data/beauty/ratings_Beauty.csv": "u,i1,5.0\n",
             "data/beauty/meta_Beauty.json.gz": b""}),
]  # fmt: skip


def foreign_checkpoint(_: bytes) -> bytes:
    """A checkpoint that is whole and belongs to another run."""
    from safetensors.numpy import save

    return save({}, metadata={"fingerprint": "another", "state": '{"dict": []}'})


RETRIEVER = "experiments/lru/custom"
UNFINISHED = {f"{RETRIEVER}/checkpoint.safetensors": "cut off"}
RESUME = f"{CUSTOM} --export_root {RETRIEVER} --resume true"

RUNS = [
    Mistake("more candidates than items", f"{CUSTOM} --num_candidates 41", "custom has 40 items"),
    Mistake("run's folder is a file", f"{CUSTOM} --export_root log.csv", "cannot write log.csv"),
    Mistake("run's folder below a file", f"{CUSTOM} --export_root log.csv/a/b", "log.csv/a/b"),
    Mistake("name too long", f"{CUSTOM} --export_root {'x' * 300}", "File name too long"),
    Mistake("cache is a file", f"{CUSTOM} --cache_root log.csv", "log.csv/custom.npz"),
    Mistake("finished run", f"{CUSTOM} --export_root {RETRIEVER}", "replace it with --overwrite"),
    Mistake("interrupted run", f"{CUSTOM} --export_root {RETRIEVER}",
            "--resume true goes on with it", UNFINISHED),
    Mistake("finished with other flags", f"{RESUME} --lr 0.5", "holds a run with other flags"),
    Mistake("finished, its settings a list", RESUME, "custom/config.json: it holds no JSON object",
            {f"{RETRIEVER}/config.json": "[]"}),
    Mistake("other flags, and a file is gone", f"{RESUME} --lr 0.5", "run with other flags",
            {f"{RETRIEVER}/candidates.npz": None}),
    Mistake("no account", f"{RESUME} --overwrite true --resume false --use_wandb true",
            "--use_wandb true: No API key configured",
            env={"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}),
    Mistake("damaged checkpoint", RESUME, "checkpoint.safetensors is damaged", UNFINISHED),
    Mistake("interrupted with other flags", RESUME, "belongs to a run with other flags",
            {f"{RETRIEVER}/checkpoint.safetensors": foreign_checkpoint}),
    Mistake("model beyond all memory", f"{CUSTOM} --hidden_units 2000000000", "the memory is full"),
    Mistake("no encoder", f"{CUSTOM} --title_encoder ./none", "--title_encoder ./none: no such"),
    Mistake("encoder without weights", f"{CUSTOM} --title_encoder model", "no weights",
            {"model/model.safetensors": None}),
    Mistake("encoder's weights damaged", f"{CUSTOM} --title_encoder model", "is damaged",
            {"model/model.safetensors": b"\0" * 64}),
]  # fmt: skip


Arrays = dict[str, np.ndarray]


def edited(change: Callable[[Arrays], Arrays]) -> Callable[[bytes], bytes]:
    """A file of arrays with some changed, or taken away where the change gives None."""

    def edit(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as file:
            arrays = dict(file)
        arrays |= change(arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **{name: x for name, x in arrays.items() if x is not None})
        return buffer.getvalue()

    return edit


def put(place: tuple[int, int], value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[place] = value
        return x

    return change


def twice(x: np.ndarray) -> np.ndarray:
    x[5, 1] = x[5, 0]
    return x


def without_answers(arrays: Arrays) -> Arrays:
    changed = {}
    for split in ("val", "test"):
        labels = arrays[f"{split}_labels"]
        items = [[i for i in (1, 2, 3) if i != label][:2] for label in labels]
        changed |= {f"{split}_items": np.array(items), f"{split}_label_ranks": labels * 0 + 40}
        changed[f"{split}_scores"] = np.zeros((len(labels), 2))
    return changed


def retrieved(what: str, name: str, content: Content, says: str) -> Mistake:
    return Mistake(f"retriever's run: {what}", CANDIDATES, says, {f"{RETRIEVER}/{name}": content})


def candidates(what: str, says: str, array: str, change: Callable) -> Mistake:
    content = edited(lambda arrays: {array: change(arrays[array])})
    return retrieved(f"candidates, {what}", "candidates.npz", content, says)


def settings(**changes: object) -> Callable[[bytes], bytes]:
    """A JSON file with settings changed."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


RETRIEVED = [
    Mistake("no such folder", f"{RANK} --llm_retrieved_path no", "no candidates.npz there"),
    Mistake("folder without a run", "train_ranker.py --llm_retrieved_path data", "no candidates"),
    Mistake("other data set", f"{RANK} --llm_retrieved_path {RETRIEVER}", "made with custom"),
    Mistake("other filters", f"{CANDIDATES} --min_uc 9", "--min_uc 9: experiments/lru/custom was"),
    retrieved("candidates empty", "candidates.npz", b"", "candidates.npz is damaged"),
    retrieved("candidates truncated", "candidates.npz", lambda x: x[:1000], "is damaged"),
    retrieved("candidates are noise", "candidates.npz", b"PK" * 99, "candidates.npz is damaged"),
    retrieved("settings damaged", "config.json", lambda x: x[:99], "custom/config.json: "),
    retrieved("settings a list", "config.json", "[1]", "config.json: it holds no JSON object"),
    retrieved("settings in brackets", "config.json", "[" * 10**5, "custom/config.json: "),
    retrieved("settings no text", "config.json", b"\xff\xfe", "custom/config.json: "),
    retrieved("setting of no sense", "config.json", settings(min_uc="few"), "min_uc: 'few' is not"),
    retrieved("no such data set", "config.json", settings(dataset_code="x"), "dataset_code is x"),
    retrieved("settings of other data", "config.json", settings(items="x.csv"), "cannot read x"),
    candidates("pickled objects", "allow_pickle=False", "val_items", lambda x: x.astype(object)),
    candidates("array missing", "val_labels", "val_labels", lambda x: None),
    candidates("of other data", "belongs to another data set", "fingerprint", lambda x: "another"),
    candidates("users missing", "test items have shape (50, 20)", "test_items", lambda x: x[:50]),
    candidates("one column", "val items have shape (60, 1)", "val_items", lambda x: x[:, :1]),
    candidates("too few scores", "scores have shape (60, 7)", "val_scores", lambda x: x[:, :7]),
    candidates("no items", "items have shape (), not", "test_items", lambda x: np.int32(7)),
    candidates("unknown item", "from 1 to 40", "test_items", put((3, 3), 41)),
    candidates("item 0", "test items must be from 1 to 40", "test_items", put((3, 3), 0)),
    candidates("item twice", "test items hold one item twice", "test_items", twice),
    candidates("half items", "must be integers", "test_items", lambda x: x + 0.5),
    candidates("scores in words", "scores must be", "test_scores", lambda x: x.astype(str)),
    candidates("scores ascend", "scores do not descend", "test_scores", lambda x: x[:, ::-1]),
    candidates("NaN", "scores do not descend", "val_scores", lambda x: x * np.nan),
    candidates("other answers", "not the held-out", "test_labels", lambda x: x % 40 + 1),
    candidates("no such rank", "ranks must be from 1", "test_label_ranks", lambda x: x * 0),
    candidates("other ranks", "disagree with the items", "test_label_ranks", lambda x: x * 0 + 40),
    retrieved("no answer found", "candidates.npz", edited(without_answers), "train the retriever"),
]  # fmt: skip

ELSEWHERE = {"HF_HUB_OFFLINE": "1"}
HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "{hub}"}
CODE = "from pathlib import Path\nPath('executed').touch()\n"
CUSTOM_CODE = {
    "model/config.json": settings(
        model_type="custom",
        architectures=["Model"],
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    ),
    "model/code.py": CODE,
}


def larger_vocabulary(content: bytes) -> bytes:
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{n}": len(vocabulary) + n for n in range(400)}
    return json.dumps(tokenizer).encode()


def model(what: str, name: str, content: Content, says: str, flags: str = "") -> Mistake:
    return Mistake(f"model: {what}", f"{MODEL} {flags}", says, {f"model/{name}": content})


MODELS = [
    Mistake("kernels", f"{CANDIDATES} --use_liger_kernel true", "its kernels need CUDA"),
    Mistake("no such model", CANDIDATES, "--llm_base_model ./none: no such"),
    Mistake("no such tokenizer", f"{MODEL} --llm_base_tokenizer ./no", "--llm_base_tokenizer ./no"),
    Mistake("model out of reach", f"{MODEL} --llm_base_model a/b", "cannot be downloaded",
            env=ELSEWHERE),
    Mistake("gated model", f"{MODEL} --llm_base_model some/gated", "ask for access", env=HUB),
    Mistake("unknown model", f"{MODEL} --llm_base_model some/x", "not on the hub", env=HUB),
    model("no settings", "config.json", None, "no config.json there"),
    model("settings damaged", "config.json", "{", "cannot read model/config.json"),
    model("settings a list", "config.json", "[]", "model/config.json: it holds no JSON object"),
    model("size in words", "config.json", settings(vocab_size="big"), "model/config.json is damag"),
    model("no weights", "model.safetensors", None, "no weights (*.safetensors) there"),
    model("weights truncated", "model.safetensors", lambda x: x[:-9], "safetensors is damaged"),
    model("weights are noise", "model.safetensors", b"x" * 99, "model.safetensors is damaged"),
    Mistake("model: pickled weights", MODEL, "other formats can run code when loaded",
            {"model/model.safetensors": None, "model/pytorch_model.bin": b"x"}),
    model("tokenizer damaged", "tokenizer.json", lambda x: x[:500], "no tokenizer that can be"),
    Mistake("model: no end of sequence", MODEL, "its tokenizer has no end-of-sequence token",
            {"model/tokenizer_config.json": settings(eos_token="<none>"),
             "model/config.json": settings(eos_token_id=None)}),
    model("tokenizer's settings a list", "tokenizer_config.json", "[]", "tokenizer_config.json"),
    model("tokenizer too large", "tokenizer.json", larger_vocabulary, "must fit --llm_base_model"),
    Mistake("prompt too long", f"{MODEL} --llm_max_text_len 5000", "model reads at most 4096"),
    Mistake("prompt too short", f"{MODEL} --llm_max_text_len 50", "a prompt with 20 candidates"),
    Mistake("too few letters", f"{MODEL} --llm_negative_sample_size 62", "has 62 labels"),
    Mistake("ranker's folder is a file", f"{MODEL} --export_root log.csv", "cannot write log.csv"),
    Mistake("ranker's folder taken", MODEL, "replace it with --overwrite",
            {"run/rankings.npz": "earlier"}),
    Mistake("ranker interrupted", MODEL, "--resume true", {"run/checkpoint.safetensors": "x"}),
    Mistake("no such modules", f"{MODEL} --lora_target_modules wide", "which has down_proj"),
    Mistake("model: code of its own", MODEL, "--llm_base_model: cannot load model", CUSTOM_CODE),
    Mistake("encoder: code of its own", f"{CUSTOM} --title_encoder model", "--title_encoder",
            CUSTOM_CODE),
    Mistake("no retriever to draw negatives", f"{MODEL} --train_candidates mixed",
            "cannot load the retriever", {f"{RETRIEVER}/model.safetensors": b"x" * 99}),
]  # fmt: skip

DATA = CUSTOM.removeprefix("train_retriever.py ").removesuffix(" --export_root run")
AUGMENT = f"augment_data.py {DATA} --llm_base_model model --export_root run"
JUDGE = f"{AUGMENT} --retriever_path {RETRIEVER}"
TRAIN_ON = f"{CUSTOM} --augmented written"
WRITTEN = {"users": np.array([0, 1]), "items": np.array([1, 40]), "fingerprint": np.array("?")}


def written(what: str, says: str, **changes: object) -> Mistake:
    """A mistake in a file of written interactions that belongs to the data otherwise."""

    def content(_: bytes) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{n: x for n, x in (WRITTEN | changes).items() if x is not None})
        return buffer.getvalue()

    return Mistake(f"written: {what}", TRAIN_ON, says, {"written/augmented.npz": content})


AUGMENTATION = [
    Mistake("no data set named to the augmentation", "augment_data.py", "--dataset_code is missin"),
    Mistake("one item to cut in two", f"{AUGMENT} --local_items 1", "--local_items 1: 2 at least"),
    Mistake("cold", f"{AUGMENT} --temperature 0", "--temperature and --top_p must be above 0"),
    Mistake("no tokens to sample", f"{AUGMENT} --top_p 0", "must be above 0"),
    Mistake("too likely", f"{AUGMENT} --top_p 1.1", "--top_p: 1.1 is out of range"),
    Mistake("no steps", f"{AUGMENT} --max_steps 0", "--max_steps: 0 is out of range"),
    Mistake("all answer, no prompt", f"{AUGMENT} --max_new_tokens 1536", "no room for a prompt"),
    Mistake("rank without a judge", f"{AUGMENT} --plausible_rank 9", "needs --retriever_path"),
    Mistake("judge absent", f"{AUGMENT} --retriever_path no", "no finished run of train_retriev"),
    Mistake("judge of other data", JUDGE, "belongs to other data than custom",
            {f"{RETRIEVER}/config.json": settings(data_fingerprint="another")}),
    Mistake("judge's settings a list", JUDGE, "config.json: it holds no JSON object",
            {f"{RETRIEVER}/config.json": "[]"}),
    Mistake("nothing to reuse", f"{AUGMENT} --reuse no", "--reuse no: no finished run of augment"),
    Mistake("reuse of a retriever", f"{AUGMENT} --reuse {RETRIEVER}", "no finished run of augment"),
    Mistake("reuse of its own folder", f"{AUGMENT} --reuse run --overwrite true",
            "--reuse run is this run's own folder: name another --export_root"),
    Mistake("reuse of what is unfinished", f"{AUGMENT} --reuse old", "--reuse old: not finished",
            {f"old/{name}": "{}" for name in (
                "config.json", "adapter", "generated.jsonl", "augmented.npz", "augmentation.json",
                "exports", "checkpoint.safetensors")}),
    Mistake("written for already", AUGMENT, "replace it with --overwrite",
            {"run/augmented.npz": "earlier"}),
    Mistake("writing resumed with other flags", f"{AUGMENT} --resume true", "with other flags",
            {"run/generated.jsonl": "", "run/config.json": "{}"}),
    Mistake("long prompts to write for", f"{AUGMENT} --llm_max_text_len 5000", "at most 4096"),
    Mistake("no model to write", f"{AUGMENT} --llm_base_model ./no", "./no: no such folder"),
    Mistake("nothing written", TRAIN_ON, "--augmented written: no augmented.npz there"),
    Mistake("written: truncated", TRAIN_ON, "augmented.npz is damaged",
            {"written/augmented.npz": b"PK" * 99}),
    written("of other data", "belongs to another data set than custom"),
    written("no items", "augmented.npz is damaged", items=None),
    written("pickled objects", "allow_pickle=False", items=np.array([1, None])),
]  # fmt: skip

ALL = [*FLAGS, *CUSTOM_DATA, *RAW_DATA, *RUNS, *RETRIEVED, *MODELS, *AUGMENTATION]


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub: a gated model's card is public, its files are not."""

    def do_GET(self) -> None:
        card = b'{"id": "some/gated", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}'
        card %= b"0" * 40
        files = b'[{"type": "file", "path": "config.json", "size": 9, "oid": "1"}]'
        if "gated" not in self.path:
            status, code, content = 404, "RepoNotFound", b""
        elif "/resolve/" in self.path:
            status, code, content = 403, "GatedRepo", b""
        else:
            status, code, content = 200, None, files if "/tree/" in self.path else card
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def template(
    toy: dict[str, Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The working directory as the module's docstring has it."""
    root = tmp_path_factory.mktemp("template")
    shutil.copy(toy["interactions"], root / "log.csv")
    shutil.copy(toy["items"], root / "titles.csv")
    shutil.copytree(tiny_llama, root / "model")
    command = CUSTOM.replace("--export_root run", "--max_steps 60 --train_batch_size 16")
    done = run_script(*command.split(), cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture()
def folder_with(template: Path, tmp_path: Path) -> Callable[[dict[str, Content]], Path]:
    """Makes the working directory with some files changed."""

    def make(files: dict[str, Content]) -> Path:
        root = tmp_path / "here"
        shutil.copytree(template, root)
        for name, content in files.items():
            path = root / name
            if name.endswith("/"):
                path.mkdir(parents=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content = content(path.read_bytes() if path.exists() else b"")
            if content is None:
                path.unlink()
            elif isinstance(content, str):
                path.write_bytes(content.encode(errors="surrogateescape"))
            else:
                path.write_bytes(content)
        return root

    return make


def snapshot(root: Path) -> dict[str, tuple[int, bytes] | None]:
    """Time of the last change and content of all files, and the folders."""
    return {
        str(path.relative_to(root)): None
        if path.is_dir()
        else (path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
    }


def check(mistake: Mistake, root: Path, hub: str = "") -> None:
    """Type the command in the folder; see that it is answered as it should be."""
    home = {"TMPDIR": str(root), "HF_HOME": str(root / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    env = {name: value.format(hub=hub) for name, value in mistake.env.items()}
    before = snapshot(root)
    done = run_script(*mistake.command.split(), cwd=root, env=home | env)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert mistake.says in lines[0]
    assert "Traceback" not in done.stdout
    assert snapshot(root) == before


@pytest.mark.parametrize("mistake", ALL, ids=[mistake.what for mistake in ALL])
def test_mistake(mistake: Mistake, folder_with: Callable, hub: str):
    if "--device cuda" in mistake.command and cuda_driver():
        pytest.skip("there may be a CUDA device")
    check(mistake, folder_with(mistake.files), hub)


def test_rows_are_distinct():
    assert len({mistake.what for mistake in ALL}) == len(ALL)


def test_folder_in_use_by_another_run(folder_with: Callable):
    root = folder_with({})
    with folder.locked(root / "run"):
        check(Mistake("", CUSTOM, "run is in use by another run"), root)
        check(Mistake("", MODEL, "run is in use by another run"), root)


def test_interrupted_run_that_was_damaged(folder_with: Callable, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise UserError("stopped before its last files")

    root = folder_with({})
    monkeypatch.chdir(root)
    monkeypatch.setattr("dataloader.candidates.save_candidates", stop)
    command = f"{CUSTOM} --max_steps 2 --val_iterations 1"
    with pytest.raises(UserError, match="stopped"):
        train_retriever.main(command.split()[1:])
    for name, says in (
        ("model.safetensors", "run/model.safetensors is damaged"),
        ("log.jsonl", "run/log.jsonl is damaged"),
        ("checkpoint.safetensors", "run/checkpoint.safetensors is damaged"),
    ):
        path = root / "run" / name
        path.write_bytes(path.read_bytes()[:-9])
        check(Mistake("", f"{command} --resume true", says), root)
