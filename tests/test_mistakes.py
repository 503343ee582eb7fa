"""Mistakes of the user, and the one line that the scripts answer.

Each row of the tables is a command, typed in a working directory that contains

    log.csv, titles.csv       a small data set with 60 users and 40 items
    data/cache/               where it is already preprocessed
    experiments/lru/custom/   a finished run of train_retriever.py
    model/                    a tiny language model

and, if the mistake is in a file, the files that are changed first. The command must exit with
status 2 and print exactly one line on stderr, ``error: ...``, that contains the row's message. No
file in the working directory may be created, changed or removed.
"""

import ast
import gzip
import http.server
import io
import json
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

import augment_data
import train_ranker
import train_retriever
from errors import UserError
from process import has_cuda_driver
from tests.helpers import ROOT, run_script
from trainer.run_folder import RunFolder

Content = str | bytes | Callable[[bytes], bytes] | None


class Mistake(NamedTuple):
    """One row.

    Attributes:
        name: names the test.
        command: the command line.
        message: text that the error message must contain.
        files: new content by file, or a function from the old content to the new one; None removes
            the file. A name that ends in a slash is an empty folder.
        env: environment variables; ``{hub}`` stands for a server that answers like the hub.
    """

    name: str
    command: str
    message: str
    files: dict[str, Content] = {}  # noqa: RUF012
    env: dict[str, str] = {}  # noqa: RUF012


RETRIEVE = "train_retriever.py --dataset_code games --data_root absent"
RANK = "train_ranker.py --dataset_code games --data_root absent"
CODE = "log-4820ad76"  # of these two files
DATA = "--dataset_code custom --interactions log.csv --items titles.csv --device cpu"
CUSTOM = f"train_retriever.py {DATA} --export_root run"
MOVIES = "train_retriever.py --dataset_code ml-100k"
BEAUTY = "train_retriever.py --dataset_code beauty"
MODEL = (
    "train_ranker.py --llm_retrieved_path experiments/lru/custom --llm_base_model model "
    "--device cpu --export_root run"
)
CANDIDATES = f"{MODEL} --llm_base_model ./none"  # if the candidates were accepted, this would fail
AUGMENT = f"augment_data.py {DATA} --llm_base_model model --export_root run"


# Flags ------------------------------------------------------------------------------------------

FLAGS = [
    Mistake("unknown flag", f"{RETRIEVE} --learning_rate 0.1",
            "unrecognized arguments: --learning_rate 0.1"),
    Mistake("abbreviated flag", "train_retriever.py --dataset games", "--dataset games"),
    Mistake("word without a flag", "train_ranker.py games", "unrecognized arguments: games"),
    Mistake("flag without a value", f"{RETRIEVE} --lr", "--lr: expected one argument"),
    Mistake("list without a value", f"{RETRIEVE} --metric_ks", "--metric_ks: expected at least"),
    Mistake("not a number", f"{RETRIEVE} --lr fast", "--lr: 'fast' is not a number"),
    Mistake("not a whole number", f"{RETRIEVE} --max_len 2.5",
            "--max_len/--bert_max_len: '2.5' is not a whole number"),
    Mistake("zero", f"{RETRIEVE} --hidden_units 0",
            "--hidden_units/--bert_hidden_units: 0 is out of range; it must be at least 1"),
    Mistake("negative", f"{RETRIEVE} --lr -1", "--lr: -1 is out of range; it must be at least 0"),
    Mistake("too large", f"{RETRIEVE} --dropout 1.0", "1.0 is out of range; it must be below 1.0"),
    Mistake("far too large", f"{RETRIEVE} --seed {10**30}", "it must be at most 2147483647"),
    Mistake("number of 400 digits", f"{RETRIEVE} --seed {'9' * 400}", "must be at most 2147483647"),
    Mistake("NaN", f"{RETRIEVE} --lr nan", "--lr: 'nan' is not a number"),
    Mistake("NaN without bounds", f"{RETRIEVE} --min_rating nan", "--min_rating: 'nan' is not a"),
    Mistake("infinite", f"{RETRIEVE} --weight_decay inf",
            "--weight_decay: inf is out of range; it must be finite"),
    Mistake("not a boolean", f"{RETRIEVE} --use_wandb perhaps",
            "--use_wandb: 'perhaps' is neither true nor false"),
    Mistake("resume maybe", f"{RETRIEVE} --resume maybe",
            "--resume: 'maybe' is neither true nor false"),
    Mistake("bare boolean before a mistake", f"{RETRIEVE} --resume --lr fast",
            "--lr: 'fast' is not a number"),
    Mistake("not a choice", f"{RETRIEVE} --model_code gru",
            "--model_code: invalid choice: 'gru' (choose from"),
    Mistake("unknown data set", "train_retriever.py --dataset_code netflix",
            "--dataset_code: invalid choice: 'netflix' (choose from"),
    Mistake("no data set for the retriever", "train_retriever.py", "--dataset_code is missing"),
    Mistake("no data set for the ranker", "train_ranker.py", "--dataset_code is missing: choose"),
    Mistake("no data set for the augmentation", "augment_data.py", "--dataset_code is missing"),
    Mistake("unknown device", f"{RETRIEVE} --device tpu", "--device: invalid choice: 'tpu'"),
    Mistake("no CUDA", f"{RETRIEVE} --device cuda",
            "--device cuda: this machine has no CUDA driver; use cpu"),
    Mistake("no CUDA for the ranker", f"{RANK} --device cuda", "--device cuda: this machine has"),
    Mistake(
        "several processes for a search", f"{RETRIEVE} --search", "start it with python",
        env={"WORLD_SIZE": "2"},
    ),
    Mistake(
        "mixed precision of accelerate", RETRIEVE, "ACCELERATE_MIXED_PRECISION=bf16 in the env",
        env={"ACCELERATE_MIXED_PRECISION": "bf16"},
    ),
    Mistake(
        "float8 of accelerate", RANK, "ACCELERATE_MIXED_PRECISION=fp8 in the env",
        env={"ACCELERATE_MIXED_PRECISION": "fp8"},
    ),
    Mistake(
        "sharded weights in one process", f"{RANK} --llm_shard_weights true",
        "--llm_shard_weights needs several processes: use torchrun",
    ),
    Mistake(
        "DeepSpeed", RANK, "ACCELERATE_USE_DEEPSPEED=true in the env",
        env={"ACCELERATE_USE_DEEPSPEED": "true"},
    ),
    Mistake("unknown metric", f"{RETRIEVE} --best_metric Accuracy@10",
            "--best_metric Accuracy@10: use Recall, MRR or NDCG with a cut-off, e.g. Recall@10"),
    Mistake("cut-off with a leading zero", f"{RETRIEVE} --best_metric NDCG@010",
            "--best_metric NDCG@010: use Recall"),
    Mistake("metric without a cut-off", f"{RETRIEVE} --best_metric Recall",
            "--best_metric Recall: use Recall"),
    Mistake("cut-off that is not computed", f"{RETRIEVE} --best_metric NDCG@7",
            "--best_metric NDCG@7: 7 is not among --metric_ks"),
    Mistake("cut-off 0", f"{RETRIEVE} --metric_ks 0", "--metric_ks: 0 is out of range"),
    Mistake("cut-off in words", f"{RETRIEVE} --metric_ks 5 ten", "--metric_ks: 'ten' is not a"),
    Mistake("far too many blocks", f"{RETRIEVE} --num_blocks 100000",
            "--num_blocks/--bert_num_blocks: 100000 is out of range; it must be at most 256"),
    Mistake("far too many jobs", f"{RETRIEVE} --search --search_jobs 2147483647",
            "--search_jobs: 2147483647 is out of range; it must be at most 1024"),
    Mistake("far too large a rank", f"{RANK} --lora_r 100000", "--lora_r: 100000 is out of range"),
    Mistake("far too many workers", f"{RETRIEVE} --num_workers 1000",
            "--num_workers: 1000 is out of range; it must be at most 256"),
    Mistake("far too many orders", f"{RANK} --permutations 1000000", "it must be at most 1000"),
    Mistake("an infinite stride", f"{RETRIEVE} --sliding_window_size 1e308", "at most 1000"),
    Mistake("no folder", f"{RETRIEVE} --export_root ''",
            "--export_root: the name is empty"),
    Mistake("no cache", f"{RETRIEVE} --cache_root ''", "--cache_root: the name is empty"),
    Mistake("one candidate", f"{RETRIEVE} --num_candidates 1", "--num_candidates: 1 is out of ran"),
    Mistake("resume and overwrite", f"{RETRIEVE} --resume --overwrite",
            "--resume continues the run that --overwrite replaces: choose one"),
    Mistake("overwrite and resume", f"{RETRIEVE} --overwrite --resume true", "choose one"),
    Mistake("sequences too short to split", f"{RETRIEVE} --min_uc 2",
            "--min_uc 2: a user needs at least 3 interactions"),
    Mistake("windows without a stride", f"{RETRIEVE} --sliding_window_size 0.001",
            "--sliding_window_size 0.001: the stride is less than one item at --max_len 50"),
    Mistake("heads of unequal size", f"{RETRIEVE} --model_code sas --num_heads 5",
            "--num_heads 5 does not divide --hidden_units 64"),
    Mistake("unknown preset", f"{RETRIEVE} --preset best", "--preset: invalid choice: 'best'"),
    Mistake("no sampled negatives", f"{RETRIEVE} --negatives 0", "--negatives: 0 is out of range"),
    Mistake("grid out of range", f"{RETRIEVE} --search_dropout 0.1 1",
            "--search_dropout: 1 is out of range"),
    Mistake("unused flag and a mistake", f"{RETRIEVE} --lora_r 8 --min_uc 2", "--min_uc 2: a user"),
    Mistake("adapters of rank 0", f"{RANK} --lora_r 0", "--lora_r: 0 is out of range"),
    Mistake("cut-off of the ranker", f"{RANK} --rerank_metric_ks 5",
            "--rerank_best_metric NDCG@10: 10 is not among --rerank_metric_ks"),
    Mistake("one fold", f"{RANK} --folds 1", "--folds 1: at least 2 are needed"),
    Mistake("metric without a cut-off for the ranker", f"{RANK} --rerank_best_metric log_loss",
            "--rerank_best_metric log_loss: use Recall, MRR or NDCG"),
    Mistake("neither auto nor a boolean", f"{RANK} --gradient_checkpointing maybe",
            "--gradient_checkpointing: invalid choice: 'maybe'"),
    Mistake("template without candidates", f"{RANK} --llm_input_template {{}}",
            "--llm_input_template needs {} twice, for the history and the candidates"),
    Mistake("letters and the whole prompt",
            f"{RANK} --response_loss letters --llm_train_on_inputs",
            "--response_loss letters has no loss for the prompt: leave out --llm_train_on_inputs"),
    Mistake("example of one item", f"{AUGMENT} --local_items 1", "--local_items 1: at least 2 are"),
    Mistake("no examples", f"{AUGMENT} --global_examples 0 --local_examples 0",
            "--global_examples 0 --local_examples 0 leave nothing to train on"),
    Mistake("temperature 0", f"{AUGMENT} --temperature 0",
            "--temperature: 0 is out of range; it must be at least 0.01"),
    Mistake("temperature that divides to infinity", f"{AUGMENT} --temperature 1e-300",
            "--temperature: 1e-300 is out of range; it must be at least 0.01"),
    Mistake("no tokens to sample from", f"{AUGMENT} --top_p 0", "must be above 0 to sample"),
    Mistake("probability above 1", f"{AUGMENT} --top_p 1.1", "--top_p: 1.1 is out of range"),
    Mistake("far too many examples", f"{AUGMENT} --global_examples 1000000",
            "--global_examples: 1000000 is out of range; it must be at most 1000"),
    Mistake("far too many examples of some items", f"{AUGMENT} --local_examples 2147483647",
            "it must be at most 1000"),
    Mistake("far too large a batch", f"{AUGMENT} --train_batch_size 2147483647",
            "--train_batch_size: 2147483647 is out of range; it must be at most 65536"),
    Mistake("far too large a batch of the ranker", f"{RANK} --train_batch_size 2147483647",
            "it must be at most 65536"),
    Mistake("no steps", f"{AUGMENT} --max_steps 0", "--max_steps: 0 is out of range"),
    Mistake("no room for a prompt", f"{AUGMENT} --max_new_tokens 1536",
            "--max_new_tokens 1536 leaves no room for a prompt in --llm_max_text_len 1536"),
    Mistake("rank without a retriever", f"{AUGMENT} --plausible_rank 9",
            "--plausible_rank needs --retriever_path"),
]  # fmt: skip


# Data -------------------------------------------------------------------------------------------

HEADER = "user,item,timestamp\n"
RATED = "user,item,timestamp,rating\n"


def parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def huge_parquet() -> bytes:
    """A billion rows of nulls in some kilobytes."""
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    part = pa.table({name: pa.nulls(10**8) for name in ("user", "item", "timestamp")})
    with parquet.ParquetWriter(buffer, part.schema) as writer:
        for _ in range(10):
            writer.write_table(part, row_group_size=10**8)
    return buffer.getvalue()


def log(name: str, content: Content, message: str, file: str = "log.csv") -> Mistake:
    """A mistake in the file of interactions, which has another name where the format matters."""
    return Mistake(f"log: {name}", CUSTOM.replace("log.csv", file), message, {file: content})


def titles(name: str, content: Content, message: str) -> Mistake:
    return Mistake(f"titles: {name}", CUSTOM, message, {"titles.csv": content})


CUSTOM_DATA = [
    Mistake("no files", "train_retriever.py --dataset_code custom",
            "--dataset_code custom needs both --interactions and --items"),
    Mistake("one file", f"{RETRIEVE} --dataset_code custom --items titles.csv", "needs both"),
    Mistake("files for another data set", f"{RETRIEVE} --interactions log.csv",
            "no other data set takes them"),
    Mistake("log absent", f"{CUSTOM} --interactions no.csv", "cannot read no.csv: No such file"),
    Mistake("titles absent", f"{CUSTOM} --items no.csv", "cannot read no.csv: No such file"),
    log("a folder", None, "dir.csv is not a regular file", "dir.csv/"),
    log("unknown format", "x", "log.xlsx: its name must end in .csv", "log.xlsx"),
    log("empty", "", "log.csv is empty"),
    log("header only", HEADER, "log.csv is empty"),
    log("no timestamps", "user,item\na,1\n", "log.csv lacks the column timestamp (or time"),
    log("other column names", "who,what,when\na,1,1\n",
        "log.csv lacks the column user (or user_id, userId, uid); it has who, what, when"),
    log("column twice", "user:a,user:b,item,timestamp\na,b,1,1\n",
        "log.csv has two columns user: rename one"),
    log("another separator", HEADER.replace(",", ";") + "a;1;1\n", "it has user;item;timestamp"),
    log("weekday", HEADER + "a,1,1\na,2,Monday\n",
        "log.csv row 3: timestamp 'Monday' is not a number"),
    log("NaN", HEADER + "a,1,nan\n", "log.csv row 2: timestamp 'nan' is neither a number nor"),
    log("infinite time", HEADER + "a,1,inf\n", "log.csv row 2: timestamp 'inf'"),
    log("empty time", HEADER + "a,1,\n", "log.csv row 2: timestamp '' is neither a number nor"),
    log("time of 400 digits", HEADER + f"a,1,{'9' * 400}\n", "log.csv row 2: timestamp '999"),
    log("rating in words", RATED + "a,1,1,good\n", "log.csv row 2: rating 'good' is not a number"),
    log("rating that overflows", RATED + "a,1,1,1e999\n", "log.csv row 2: rating '1e999'"),
    log("control characters", HEADER + 'a,1,"x\n\x1b[2J"\n', r"timestamp 'x\n\x1b[2J' is neither"),
    log("empty user", HEADER + "a,1,1\n,2,2\n", "log.csv row 3: user is empty"),
    log("empty item", HEADER + "a,,1\n", "log.csv row 2: item is empty"),
    log("short row", HEADER + "a,1,1\na\n",
        "cannot read log.csv: Expected 3 fields in line 3, saw 1"),
    log("long row", HEADER + "a,1,1\na,1,1,1\n",
        "cannot read log.csv: Expected 3 fields in line 3, saw 4"),
    log("long rows", HEADER + "a,1,1,1\na,2,1,1\n", "more fields than its first line"),
    log("open quote", HEADER + 'a,"1,1\n', "a quote in it may not be closed"),
    log("noise", bytes(range(256)) * 9, "log.csv is not UTF-8 text: save it in that encoding"),
    log("UTF-16", (HEADER + "a,1,1\n").encode("utf-16"), "log.csv is not UTF-8 text"),
    log("not Parquet", HEADER + "a,1,1\n", "cannot read log.parquet: ", "log.parquet"),
    log("truncated Parquet",
        lambda _: parquet(pd.DataFrame({"user": ["a"], "item": ["1"], "timestamp": [1]}))[:-9],
        "cannot read log.parquet: ", "log.parquet"),
    log("huge Parquet", lambda _: huge_parquet(), "unpacks to more than 4 GiB", "log.parquet"),
    log("commas for tabs", HEADER + "a,1,1\n", "log.inter lacks the column user", "log.inter"),
    log("too few interactions", HEADER + "a,i1,1\n",
        ": no interactions remain with at least 5 per user and 5 per item: lower --min_uc, "
        "--min_sc or --min_rating, or use more data"),
    Mistake("ratings too low", f"{CUSTOM} --min_rating 6", "lower --min_uc, --min_sc or --min_rat",
            {"log.csv": RATED + "".join(f"a,i{n},1,5\n" for n in range(9))}),
    Mistake("no ratings", f"{CUSTOM} --min_rating 3", " has no ratings"),
    titles("empty", "", "titles.csv is empty"),
    titles("no header", "i1,One\ni2,Two\n", "titles.csv lacks the column item (or item_id"),
    titles("no titles", "item\ni1\n", "titles.csv lacks the column title (or name"),
    titles("most are missing", "item,title\n1,One\n",
           "titles.csv has no title for 40 of the items in log.csv"),
    titles("one is blank", lambda x: x.replace(b'"The i7 Story, part 7"', b'" \t "'),
           "no title for 1 of the items in log.csv, the first is 'i7'"),
]  # fmt: skip

FILMS = "movieId,title,genres\n" + "".join(f"{i},Film {i} (1999),Drama\n" for i in range(6))
RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{u},{i},5,{u + i}\n" for u in range(6) for i in range(6)
)
REVIEWS = "u,i1,5.0,1\n"
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def ratings(name: str, content: str, message: str) -> Mistake:
    files = {"data/ml-100k/ratings.csv": content, "data/ml-100k/movies.csv": FILMS}
    return Mistake(f"MovieLens: {name}", MOVIES, message, files)


def films(name: str, content: str, message: str) -> Mistake:
    files = {"data/ml-100k/ratings.csv": RATINGS, "data/ml-100k/movies.csv": content}
    return Mistake(f"MovieLens: {name}", MOVIES, message, files)


def metadata(name: str, content: bytes, message: str) -> Mistake:
    files = {
        "data/beauty/ratings_Beauty.csv": REVIEWS, "data/beauty/meta_Beauty.json.gz": content,
    }  # fmt: skip
    return Mistake(f"Amazon: {name}", BEAUTY, message, files)


RAW_DATA = [
    Mistake("MovieLens: no network", MOVIES,
            "fetch it by hand and put its ratings.csv and movies.csv into data/ml-100k",
            env=NO_NETWORK),
    Mistake("Amazon: no network", BEAUTY,
            "fetch it by hand and save it as data/beauty/ratings_Beauty.csv, or run again to resu",
            env=NO_NETWORK),
    Mistake("data root is a file", f"{MOVIES} --data_root log.csv", "log.csv/ml-100k: Not a dir",
            env=NO_NETWORK),
    ratings("no timestamps", RATINGS.replace("timestamp", "when"), "lacks the column timestamp"),
    ratings("weekday", RATINGS + "7,1,5,Monday\n", "ratings.csv row 38: timestamp 'Monday'"),
    ratings("rating in words", RATINGS + "7,1,good,1\n", "ratings.csv row 38: rating 'good'"),
    ratings("infinite time", RATINGS + "7,1,5,inf\n", "ratings.csv row 38: timestamp 'inf'"),
    ratings("empty user", RATINGS + ",1,5,1\n", "ratings.csv row 38: user is empty"),
    ratings("empty", "", "ratings.csv is empty"),
    ratings("header only", RATINGS.splitlines()[0] + "\n", "ratings.csv is empty"),
    ratings("long row", RATINGS + "1,2,3,4,5,6,7\n", "Expected 4 fields in line 38, saw 7"),
    ratings("truncated", RATINGS[:200], "ml-100k: no interactions remain with at least 5 per user"),
    films("no films", "", "movies.csv is empty"),
    films("no titles", FILMS.replace("title", "name"), "movies.csv lacks the column title; it has"),
    films("not UTF-8", FILMS + "9,\udcff,\n", "movies.csv is not UTF-8 text"),
    Mistake("MovieLens 1998: short row", "train_retriever.py --dataset_code ml-100k-classic",
            "ml-100k.inter: Expected 4 fields in line 3, saw 2",
            {"data/ml-100k-classic/ml-100k.inter": "user_id\titem_id\trating\ttimestamp\n"
             "1\t1\t1\t1\n1\t2\n", "data/ml-100k-classic/ml-100k.item": "x"}),
    metadata("truncated", gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n" * 50)[:-12],
             "meta_Beauty.json.gz is not a complete gzip file (Compressed file ended"),
    metadata("not gzip", b"not gzip at all", "delete it to download it again"),
    metadata("half a record", gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n{'asin': 'i2', 't\n"),
             "meta_Beauty.json.gz row 2: not a record with asin and title"),
    metadata("not a record", gzip.compress(b"[1, 2]\n"), "row 1: not a record with asin and title"),
    metadata("no asin", gzip.compress(b"{'title': 'x'}\n"), "row 1: not a record with asin"),
    metadata("program", gzip.compress(b"open('log.csv', 'w')\n"), "row 1: not a record with asin"),
    metadata("deep nesting", gzip.compress(b"[" * 100_000 + b"\n"), "row 1: not a record with"),
    metadata("empty", gzip.compress(b""), "meta_Beauty.json.gz is empty"),
    metadata("not UTF-8", gzip.compress(b"\xff\xfe\x00\n"), "row 1 is not UTF-8 text"),
    metadata("huge line", gzip.compress(b" " * (17 << 20)), "row 1: longer than 16,777,216 bytes"),
    Mistake("Amazon: three columns", BEAUTY,
            "ratings_Beauty.csv has 3 columns but needs user, item, rating, timestamp",
            {"data/beauty/ratings_Beauty.csv": "u,i1,5.0\n",
             "data/beauty/meta_Beauty.json.gz": b""}),
]  # fmt: skip


# Runs -------------------------------------------------------------------------------------------


def settings(**changes: object) -> Callable[[bytes], bytes]:
    """Change entries of a JSON file."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def foreign_checkpoint(_: bytes) -> bytes:
    """A complete checkpoint that belongs to another run."""
    from safetensors.numpy import save

    return save({}, metadata={"fingerprint": "another", "state": '{"dict": []}'})


RETRIEVER = "experiments/lru/custom"
UNFINISHED = {f"{RETRIEVER}/checkpoint.safetensors": "cut off"}
AGAIN = f"{CUSTOM} --export_root {RETRIEVER}"
RESUME = f"{AGAIN} --resume"

RUNS = [
    Mistake("more candidates than items", f"{CUSTOM} --num_candidates 41",
            f"--num_candidates 41: {CODE} has only 40 items"),
    Mistake("more negatives than items", f"{CUSTOM} --negatives 2147483647",
            f"--negatives 2147483647: {CODE} has only 40 items"),
    Mistake("run's folder is a file", f"{CUSTOM} --export_root log.csv", "cannot write log.csv: "),
    Mistake("run's folder below a file", f"{CUSTOM} --export_root log.csv/a/b",
            "cannot write log.csv/a/b: Not a directory"),
    Mistake("name too long", f"{CUSTOM} --export_root {'x' * 300}", "File name too long"),
    Mistake("cache is a file", f"{CUSTOM} --cache_root log.csv",
            f"cannot write log.csv/{CODE}.npz"),
    Mistake("finished run", AGAIN, f"{RETRIEVER} holds an earlier run: replace it with --overwrite,"
            " or use another --export_root"),
    Mistake("interrupted run", AGAIN, f"{RETRIEVER} holds an interrupted run: continue it with "
            "--resume, or start from scratch with --overwrite", UNFINISHED),
    Mistake("finished with other flags", f"{RESUME} --lr 0.5",
            f"{RETRIEVER} holds a run with other settings or data: resume with the settings in its "
            "config.json, use another --export_root, or replace it with --overwrite"),
    Mistake("finished with other data", RESUME, "holds a run with other settings or data",
            {f"{RETRIEVER}/config.json": settings(fingerprint="another")}),
    Mistake("other flags, and a file is missing", f"{RESUME} --lr 0.5", "run with other settings",
            {f"{RETRIEVER}/candidates.npz": None}),
    Mistake("finished, its settings are a list", RESUME, "config.json: it holds no JSON object",
            {f"{RETRIEVER}/config.json": "[]"}),
    Mistake("damaged checkpoint", f"{CUSTOM} --export_root {RETRIEVER} --resume true",
            "start from scratch with --overwrite", UNFINISHED),
    Mistake("checkpoint of another run", RESUME, f"{RETRIEVER}/checkpoint.safetensors belongs to a "
            "run with other settings or data: start from scratch with --overwrite",
            {f"{RETRIEVER}/checkpoint.safetensors": foreign_checkpoint}),
    Mistake("no account", f"{AGAIN} --overwrite --use_wandb", "--use_wandb: No API key configured",
            env={"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}),
    Mistake("too wide for the memory", f"{CUSTOM} --hidden_units 16384 --num_blocks 64",
            "--hidden_units 16384, --num_blocks 64: training "),
    Mistake("far too wide", f"{CUSTOM} --hidden_units 2000000000", "it must be at most 16384"),
    Mistake("no encoder", f"{CUSTOM} --title_encoder ./none",
            "--title_encoder ./none: neither a folder nor owner/name on the hub"),
    Mistake("encoder without weights", f"{CUSTOM} --title_encoder model",
            "--title_encoder model: no weights (*.safetensors) there",
            {"model/model.safetensors": None}),
    Mistake("encoder with damaged weights", f"{CUSTOM} --title_encoder model",
            "--title_encoder model: model/model.safetensors is damaged (",
            {"model/model.safetensors": b"\0" * 64}),
]  # fmt: skip


# The retriever's run, as the ranker reads it ----------------------------------------------------

Arrays = dict[str, Any]


def edited(change: Callable[[Arrays], Arrays]) -> Callable[[bytes], bytes]:
    """Replace arrays of an ``.npz`` file, or remove those that are None."""

    def edit(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as file:
            arrays = dict(file)
        arrays |= change(arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **{name: x for name, x in arrays.items() if x is not None})
        return buffer.getvalue()

    return edit


def put(index: tuple[int, int], value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[index] = value
        return x

    return change


def repeat_item(x: np.ndarray) -> np.ndarray:
    x[5, 1] = x[5, 0]
    return x


def without_targets(arrays: Arrays) -> Arrays:
    """Two candidates per user, none of them the target."""
    changed = {}
    for split in ("val", "test"):
        targets = arrays[f"{split}_labels"]
        items = [[item for item in (1, 2, 3) if item != target][:2] for target in targets]
        changed |= {f"{split}_items": np.array(items), f"{split}_label_ranks": targets * 0 + 40}
        changed[f"{split}_scores"] = np.zeros((len(targets), 2))
    return changed


def retrieved(name: str, file: str, content: Content, message: str) -> Mistake:
    files = {f"{RETRIEVER}/{file}": content}
    return Mistake(f"retriever's run: {name}", CANDIDATES, message, files)


def candidates(name: str, message: str, array: str, change: Callable) -> Mistake:
    content = edited(lambda arrays: {array: change(arrays[array])})
    return retrieved(f"candidates, {name}", "candidates.npz", content, message)


RETRIEVED = [
    Mistake("no such folder", f"{RANK} --llm_retrieved_path no",
            "--llm_retrieved_path no: no candidates.npz there; name the folder of a finished run"),
    Mistake("folder without a run", "train_ranker.py --llm_retrieved_path data",
            "--llm_retrieved_path data: no candidates.npz there"),
    Mistake("no run in the default folder", f"train_ranker.py {DATA} --experiment_root none",
            f"none/lru/{CODE}/candidates.npz does not exist: run train_retriever.py with the "),
    Mistake("other data set", f"{RANK} --llm_retrieved_path {RETRIEVER}",
            f"--dataset_code games: {RETRIEVER} used custom; leave out the flag or name another "
            "--llm_retrieved_path"),
    Mistake("other filters", f"{CANDIDATES} --min_uc 9", f"--min_uc 9: {RETRIEVER} used 5; leave "),
    Mistake("no weights of the retriever", f"{CANDIDATES} --verbalizer titles",
            f"{RETRIEVER}: no model.safetensors there, which --title_prior retriever needs; run "
            "train_retriever.py again, or set --title_prior popularity",
            {f"{RETRIEVER}/model.safetensors": None}),
    Mistake("unknown prior", f"{CANDIDATES} --verbalizer titles --title_prior items",
            "error: --title_prior: invalid choice: 'items' (choose from "),
    retrieved("candidates empty", "candidates.npz", b"", "candidates.npz is damaged ("),
    retrieved("candidates truncated", "candidates.npz", lambda x: x[:1000],
              "run train_retriever.py with the same data and --min_* flags"),
    retrieved("candidates are noise", "candidates.npz", b"PK" * 99, "candidates.npz is damaged ("),
    retrieved("settings damaged", "config.json", lambda x: x[:99],
              "(char 99): run train_retriever.py again"),
    retrieved("settings are a list", "config.json", "[1]", "config.json: it holds no JSON object"),
    retrieved("deeply nested settings", "config.json", "[" * 10**5, "custom/config.json: "),
    retrieved("settings not UTF-8", "config.json", b"\xff\xfe", "custom/config.json: "),
    retrieved("invalid setting", "config.json", settings(min_uc="few"),
              "config.json is damaged (min_uc: 'few' is not a whole number): run train_retriever.py"
              " again"),
    retrieved("unknown data set", "config.json", settings(dataset_code="x"),
              "config.json is damaged (dataset_code: 'x' is not a valid value)"),
    retrieved("settings of other data", "config.json", settings(items="x.csv"), "cannot read x"),
    candidates("pickled objects", "allow_pickle=False", "val_items", lambda x: x.astype(object)),
    candidates("missing array", "is damaged (no 'val_labels')", "val_labels", lambda x: None),
    candidates("other data", f"belongs to other data than {CODE}, or to other filters: run",
               "fingerprint", lambda x: "another"),
    candidates("missing users", "test items have shape (50, 20), not (60, candidates)",
               "test_items", lambda x: x[:50]),
    candidates("one column", "val items have shape (60, 1)", "val_items", lambda x: x[:, :1]),
    candidates("too few scores", "scores have shape (60, 7)", "val_scores", lambda x: x[:, :7]),
    candidates("one number", "items have shape (), not", "test_items", lambda x: np.int32(7)),
    candidates("unknown item", "items must be from 1 to 40", "test_items", put((3, 3), 41)),
    candidates("item 0", "test items must be from 1 to 40", "test_items", put((3, 3), 0)),
    candidates("repeated item", "contain the same item twice", "test_items", repeat_item),
    candidates("fractions", "must be integers", "test_items", lambda x: x + 0.5),
    candidates("scores in words", "scores must be", "test_scores", lambda x: x.astype(str)),
    candidates("ascending", "scores do not descend", "test_scores", lambda x: x[:, ::-1]),
    candidates("NaN", "val scores do not descend", "val_scores", lambda x: x * np.nan),
    candidates("other targets", "not the held-out", "test_labels", lambda x: x % 40 + 1),
    candidates("rank 0", "label ranks must be from 1 to", "test_label_ranks", lambda x: x * 0),
    candidates("other ranks", "disagree with the items", "test_label_ranks", lambda x: x * 0 + 40),
    retrieved("no target retrieved", "candidates.npz", edited(without_targets),
              f"{RETRIEVER}: no user's target is among the candidates, so there is nothing to"),
]  # fmt: skip


# Language models --------------------------------------------------------------------------------

OFFLINE = {"HF_HUB_OFFLINE": "1"}
HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "{hub}"}
CUSTOM_CODE = {
    "model/config.json": settings(
        model_type="custom",
        architectures=["Model"],
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    ),
    "model/code.py": "from pathlib import Path\nPath('executed').touch()\n",
}


def larger_vocabulary(content: bytes) -> bytes:
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{n}": len(vocabulary) + n for n in range(400)}
    return json.dumps(tokenizer).encode()


def model(name: str, file: str, content: Content, message: str) -> Mistake:
    return Mistake(f"model: {name}", MODEL, message, {f"model/{file}": content})


MODELS = [
    Mistake("kernels without CUDA", f"{CANDIDATES} --use_liger_kernel",
            "--use_liger_kernel: Liger's kernels need CUDA; leave out the flag"),
    Mistake("no such model", CANDIDATES,
            "--llm_base_model ./none: neither a folder nor owner/name on the hub; use another"),
    Mistake("no such model for the augmentation", f"{AUGMENT} --llm_base_model ./no",
            "--llm_base_model ./no: neither a folder nor"),
    Mistake("no such tokenizer", f"{MODEL} --llm_base_tokenizer ./no",
            "--llm_base_tokenizer ./no: neither a folder nor"),
    Mistake("hub out of reach", f"{MODEL} --llm_base_model a/b",
            "--llm_base_model a/b: it is not on this machine and cannot be downloaded (",
            env=OFFLINE),
    Mistake("gated model", f"{MODEL} --llm_base_model some/gated",
            "--llm_base_model some/gated: it is gated: ask for access at https://huggingface.co/"
            "some/gated, then run 'hf auth login'", env=HUB),
    Mistake("unknown model", f"{MODEL} --llm_base_model some/x",
            "--llm_base_model some/x: it is not on the hub under this name and revision", env=HUB),
    model("no settings", "config.json", None, "--llm_base_model model: no config.json there"),
    model("settings damaged", "config.json", "{", "cannot read model/config.json"),
    model("settings are a list", "config.json", "[]", "model/config.json: it holds no JSON object"),
    model("size in words", "config.json", settings(vocab_size="big"),
          "model/config.json is damaged ("),
    model("no weights", "model.safetensors", None,
          "--llm_base_model model: no weights (*.safetensors) there"),
    model("weights truncated", "model.safetensors", lambda x: x[:-9],
          "--llm_base_model model: model/model.safetensors is damaged ("),
    model("weights are noise", "model.safetensors", b"x" * 99, "model.safetensors is damaged"),
    Mistake("model: pickled weights", MODEL, "other formats can run code when loaded",
            {"model/model.safetensors": None, "model/pytorch_model.bin": b"x"}),
    model("tokenizer damaged", "tokenizer.json", lambda x: x[:500],
          "name another tokenizer with --llm_base_tokenizer"),
    Mistake("model: no end of sequence", MODEL, "model: its tokenizer has no end-of-sequence token:"
            " name another tokenizer with --llm_base_tokenizer",
            {"model/tokenizer_config.json": settings(eos_token="<none>"),
             "model/config.json": settings(eos_token_id=None)}),
    model("tokenizer's settings are a list", "tokenizer_config.json", "[]",
          "model/tokenizer_config.json: it holds no JSON object"),
    model("tokenizer too large", "tokenizer.json", larger_vocabulary,
          "use another --llm_base_model or --llm_base_tokenizer"),
    Mistake("prompt too long", f"{MODEL} --llm_max_text_len 5000",
            "--llm_max_text_len 5000: model reads at most 4096 tokens"),
    Mistake("prompt too long for the augmentation", f"{AUGMENT} --llm_max_text_len 5000",
            "--llm_max_text_len 5000: model reads at most 4096 tokens"),
    Mistake("history too long for its text", f"{MODEL} --verbalizer titles --llm_max_text_len 50",
            "--llm_max_text_len 50: 20 titles can take"),
    Mistake("unknown verbalizer", f"{MODEL} --verbalizer numbers", "--verbalizer: invalid choice"),
    Mistake("validation without users", f"{MODEL} --val_users 0", "--val_users: 0 is out of range"),
    Mistake("prompt too short", f"{MODEL} --llm_max_text_len 50",
            "tokens; raise it or lower --llm_max_title_len"),
    Mistake("too few letters", f"{MODEL} --llm_negative_sample_size 62",
            "63 candidates: the tokenizer has only 62 one-token letters; lower "
            "--llm_negative_sample_size and the retriever's --num_candidates"),
    Mistake("unknown modules", f"{MODEL} --lora_target_modules wide",
            "--lora_target_modules wide: not in model, which has down_proj"),
    Mistake("model: code of its own", MODEL, "--llm_base_model model: cannot be loaded (The",
            CUSTOM_CODE),
    Mistake("encoder: code of its own", f"{CUSTOM} --title_encoder model",
            "--title_encoder model: cannot be loaded (The", CUSTOM_CODE),
    Mistake("no retriever to draw negatives", f"{MODEL} --train_candidates mixed",
            f"{RETRIEVER}: cannot load the retriever (",
            {f"{RETRIEVER}/model.safetensors": b"x" * 99}),
    Mistake("ranker's folder is a file", f"{MODEL} --export_root log.csv", "cannot write log.csv"),
    Mistake("ranker's run exists", MODEL, "run holds an earlier run: replace it with --overwrite",
            {"run/rankings.npz": "earlier"}),
    Mistake("ranker was interrupted", MODEL, "run holds an interrupted run: continue it with --re",
            {"run/checkpoint.safetensors": "x"}),
]  # fmt: skip


# Augmentation -----------------------------------------------------------------------------------

JUDGE = f"{AUGMENT} --retriever_path {RETRIEVER}"
TRAIN_ON = f"{CUSTOM} --augmented generated"
GENERATED = {"users": np.array([0, 1]), "items": np.array([1, 40]), "fingerprint": np.array("?")}
AUGMENTATION_FILES = (
    "config.json", "adapter", "generated.jsonl", "augmented.npz", "augmentation.json", "exports",
)  # fmt: skip


def generated(name: str, message: str, **changes: object) -> Mistake:
    """A mistake in a file of generated interactions."""

    def content(_: bytes) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{n: x for n, x in (GENERATED | changes).items() if x is not None})
        return buffer.getvalue()

    return Mistake(f"generated: {name}", TRAIN_ON, message, {"generated/augmented.npz": content})


AUGMENTATION = [
    Mistake("no such retriever", f"{AUGMENT} --retriever_path no", "--retriever_path no: no "
            "finished run of train_retriever.py there; name one, e.g. experiments/lru/ml-100k"),
    Mistake("damaged retriever", JUDGE, f"{RETRIEVER}: cannot load the retriever",
            {f"{RETRIEVER}/model.safetensors": lambda x: x[:-9]}),
    Mistake("retriever of other data", JUDGE,
            f"--retriever_path {RETRIEVER}: belongs to other data than {CODE}; name a retriever",
            {f"{RETRIEVER}/config.json": settings(data_fingerprint="another")}),
    Mistake("retriever's settings are a list", JUDGE, "config.json: it holds no JSON object",
            {f"{RETRIEVER}/config.json": "[]"}),
    Mistake("no such run to reuse", f"{AUGMENT} --reuse no",
            "--reuse no: no finished run of augment_data.py there"),
    Mistake("reuse of a retriever", f"{AUGMENT} --reuse {RETRIEVER}",
            f"--reuse {RETRIEVER}: no finished run of augment_data.py there"),
    Mistake("reuse of the same folder", f"{AUGMENT} --reuse run --overwrite",
            "--reuse run is the folder of this run; use another --export_root"),
    Mistake("reuse of an unfinished run", f"{AUGMENT} --reuse old",
            "--reuse old: that run is not finished; continue it with --resume first",
            {f"old/{name}": "{}" for name in (*AUGMENTATION_FILES, "checkpoint.safetensors")}),
    Mistake("augmentation exists", AUGMENT, "run holds an earlier run: replace it with --overwrite",
            {"run/augmented.npz": "earlier"}),
    Mistake("augmentation was interrupted", AUGMENT, "run holds an interrupted run: continue it wi",
            {"run/checkpoint.safetensors": "x"}),
    Mistake("augmentation with other flags", f"{AUGMENT} --resume",
            "run holds a run with other settings or data: resume with the settings in its config",
            {"run/generated.jsonl": "", "run/config.json": "{}"}),
    Mistake("generated: no such run", TRAIN_ON, "--augmented generated: no augmented.npz there; "
            "name a finished run of augment_data.py with the same data and --min_* flags"),
    Mistake("generated: noise", TRAIN_ON, "generated/augmented.npz is damaged (",
            {"generated/augmented.npz": b"PK" * 99}),
    generated("other data", f"augmented.npz belongs to another data set than {CODE} or to other "
              "filters: name a finished run of augment_data.py"),
    generated("no items", "augmented.npz is damaged (no 'items')", items=None),
    generated("pickled objects", "allow_pickle=False", items=np.array([1, None])),
]  # fmt: skip


# Reports ----------------------------------------------------------------------------------------

COMPARE = f"report.py --compare {RETRIEVER} {RETRIEVER}"

REPORTS = [
    Mistake("report of nothing", "report.py --experiment_root data",
            "--experiment_root data: no finished run there"),
    Mistake("report with a damaged run", "report.py", "is damaged (",
            {f"{RETRIEVER}/candidates.npz": b""}),
    Mistake("comparison with nothing", f"report.py --compare {RETRIEVER} data",
            "--compare data: no finished run there"),
    Mistake("comparison of one run", "report.py --compare data", "--compare: expected 2 arguments"),
    Mistake("comparison by an unknown metric", f"{COMPARE} --metric Accuracy",
            "--metric Accuracy: use Recall, MRR or NDCG with a cut-off"),
]  # fmt: skip

ALL = [
    *FLAGS, *CUSTOM_DATA, *RAW_DATA, *RUNS, *RETRIEVED, *MODELS, *AUGMENTATION, *REPORTS,
]  # fmt: skip


# The test ---------------------------------------------------------------------------------------


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
    """Address of a server that answers like the hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def template(
    toy: dict[str, Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The working directory that the module's docstring describes."""
    root = tmp_path_factory.mktemp("template")
    shutil.copy(toy["interactions"], root / "log.csv")
    shutil.copy(toy["items"], root / "titles.csv")
    shutil.copytree(tiny_llama, root / "model")
    command = f"{CUSTOM} --export_root {RETRIEVER} --max_steps 60 --train_batch_size 16"
    done = run_script(*command.split(), cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture()
def folder_with(template: Path, tmp_path: Path) -> Callable[[dict[str, Content]], Path]:
    """Function that makes a copy of the working directory with some files changed."""

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
    """Modification time and content of every file below a folder; None for folders."""
    return {
        str(path.relative_to(root)): None
        if path.is_dir()
        else (path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
    }


def check(mistake: Mistake, root: Path, hub: str = "") -> None:
    """Run the command in a folder and check its answer."""
    env = {
        "TMPDIR": str(root),
        "HF_HOME": str(root / "hub"),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Caches of libraries, which they create when they are imported.
        "TORCHINDUCTOR_CACHE_DIR": str(root.parent / "torch"),
        "MPLCONFIGDIR": str(root.parent / "matplotlib"),
    }
    env |= {name: value.format(hub=hub) for name, value in mistake.env.items()}
    before = snapshot(root)
    done = run_script(*shlex.split(mistake.command), cwd=root, env=env)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert mistake.message in lines[0]
    assert "Traceback" not in done.stdout
    assert snapshot(root) == before


@pytest.mark.parametrize("mistake", ALL, ids=[mistake.name for mistake in ALL])
def test_mistake(mistake: Mistake, folder_with: Callable, hub: str):
    if "--device cuda" in mistake.command and has_cuda_driver():
        pytest.skip("there may be a CUDA device")
    check(mistake, folder_with(mistake.files), hub)


def test_rows_are_distinct():
    assert len({mistake.name for mistake in ALL}) == len(ALL)


def test_folder_in_use_by_another_run(folder_with: Callable):
    root = folder_with({})
    message = "run is in use by another run: wait for it or use another --export_root"
    with RunFolder(root / "run", (), "").locked():
        for command in (CUSTOM, MODEL, AUGMENT):
            check(Mistake("", command, message), root)


def test_checkpoint_of_another_ranker(folder_with: Callable):
    """Not a row, as loading the language model draws a progress bar first."""
    root = folder_with({"run/checkpoint.safetensors": foreign_checkpoint})
    before = snapshot(root)
    done = run_script(*MODEL.split(), "--resume", cwd=root)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: run/checkpoint.safetensors belongs to a run with other settings or data: start "
        "from scratch with --overwrite"
    )
    assert snapshot(root) == before


def test_damaged_files_of_an_interrupted_run(
    folder_with: Callable, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object) -> None:
        raise UserError("stopped before its last files")

    root = folder_with({})
    monkeypatch.chdir(root)
    monkeypatch.setattr("recipes.fit_retriever.save_candidates", stop)
    command = f"{CUSTOM} --max_steps 2 --val_iterations 1"
    with pytest.raises(UserError, match="stopped"):
        train_retriever.main(command.split()[1:])
    for name in ("model.safetensors", "log.jsonl", "checkpoint.safetensors"):
        path = root / "run" / name
        path.write_bytes(path.read_bytes()[:-9])
        check(Mistake("", f"{command} --resume", f"run/{name} is damaged ("), root)


@pytest.mark.parametrize("free", [0, 300_000])
@pytest.mark.parametrize("command", [MODEL, AUGMENT])
def test_no_memory_for_a_language_model(
    command: str, free: int, folder_with: Callable, monkeypatch: pytest.MonkeyPatch
):
    root = folder_with({"run/rankings.npz": "earlier", "run/augmented.npz": "earlier"})
    before = snapshot(root)
    monkeypatch.chdir(root)
    monkeypatch.setattr("recipes.tuning.free_memory", lambda: free)
    script, *words = (
        f"{command} --overwrite --lora_r 1 --tokens_per_batch 2147483647 --max_steps 1".split()
    )
    main = {"train_ranker.py": train_ranker.main, "augment_data.py": augment_data.main}[script]
    message = "--tokens_per_batch 2147483647: training on " if free else "--llm_base_model model: "
    with pytest.raises(UserError, match=f"^{message}"):
        main(words)
    assert snapshot(root) == before


# Fast answers -----------------------------------------------------------------------------------

SLOW_IMPORTS = {"torch", "transformers", "peft", "accelerate", "matplotlib"}


@pytest.mark.parametrize(
    "command",
    [
        f"{CUSTOM} --help",
        f"{CUSTOM} --lr fast",
        f"{CUSTOM} --num_candidates 41",  # found after the data is loaded
        f"{MODEL} --help",
        f"{MODEL} --lora_r 0",
        f"{MODEL} --llm_max_text_len 5000",  # found after the model's files are read
        f"{AUGMENT} --help",
        f"{AUGMENT} --top_p 0",
        f"{AUGMENT} --llm_max_text_len 5000",
        "report.py --help",
        "report.py --compare data data",
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(command: str, folder_with: Callable):
    done = run_script(*command.split(), cwd=folder_with({}), env={"PYTHONPROFILEIMPORTTIME": "1"})
    helps = command.endswith("--help")
    assert done.returncode == (0 if helps else 2), done.stderr
    assert ("usage: " if helps else "error: ") in (done.stdout if helps else done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "argparse" in imported and imported.isdisjoint(SLOW_IMPORTS)


# Flags in messages ------------------------------------------------------------------------------

BELOW_SCRIPTS = (
    "errors.py", "storage.py", "downloads.py", "jagged.py", "metrics.py", "datasets", "dataloader",
    "model", "evaluation", "trainer", "augmentation", "reporting",
)  # fmt: skip
PIP_OPTIONS = {
    "--no-deps", "--require-hashes", "--only-binary", "--dest", "--requirement", "--hash",
}  # fmt: skip


def test_only_scripts_and_recipes_name_flags():
    """The modules below name their arguments; scripts and recipes translate these to flags."""
    paths = [path for name in BELOW_SCRIPTS for path in (ROOT / name).rglob("*.py")]
    paths += [ROOT / name for name in BELOW_SCRIPTS if name.endswith(".py")]
    assert len(paths) > 45
    for path in paths:
        allowed = PIP_OPTIONS if path.name == "downloads.py" else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                flags = set(re.findall(r"--[a-z][a-z_-]{2,}", node.value)) - allowed
                assert not flags, f"{path}:{node.lineno}"
