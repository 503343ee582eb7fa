"""The README of an export: what each file is, and how to load it with its stock library."""

from __future__ import annotations

from pathlib import Path
from string import Template

from datasets import SequenceDataset

RETRIEVER = Template("""\
# An exported run

Source: `$run`, data set $code: $num_users users, $num_items items.

## Users and items

`items.parquet` has the number, name and title of every item, `users.parquet` the number and name of
every user. Names are those of the raw data. `candidates.parquet` holds the retriever's candidates
after the history before the validation item (`split` is `val`) and before the test item (`test`);
`target` marks the held-out item.

```python
import pandas as pd

items = pd.read_parquet("items.parquet").set_index("item")
candidates = pd.read_parquet("candidates.parquet")
```

## The retriever

`retriever.pt2` is a `torch.export` program. It takes histories of item numbers, oldest first, as
rows of $max_len int64 padded with 0 on the left, and returns a score for every item number, where
column 0 is not an item.
$masking

```python
import torch

program = torch.export.load("retriever.pt2").module()

def scores(history):
    last = history[-$max_len:]
    return program(torch.tensor([[0] * ($max_len - len(last)) + last]))[0]

best = scores([3, 1, 4]).topk(20).indices.tolist()
print(items.loc[best, "title"])
```

It was traced on a CPU; `torch.export.passes.move_to_device_pass(exported, "cuda")` moves what
`torch.export.load` returns to a GPU.
""")

MASKED = (
    "The items of a row have a score of minus infinity. If a history is longer, exclude its older "
    "items\nyourself."
)
NOT_MASKED = "The items of a history can be recommended again."

RANKER = Template("""
## The ranker

`adapter/` is a PEFT adapter of `$base_model`, `prompt.json` what surrounds titles, and
`rankings.parquet` the ranker's order of the test candidates of all users whose target was
retrieved. `fusion.json` has the weights of both stages: a fused score is the weighted sum of the
features that it names. `retriever_log_probability` is the log of the softmax over the candidates'
retriever scores.

```python
import json
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

prompt = json.load(open("prompt.json"))
base = prompt["base_model_folder"]  # on another machine: its folder there, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, "adapter").eval()
```
""")

LETTERS = """
`letter_logit` is the logit of a candidate's letter after the prompt, which has the titles of the
history, the last `max_history` items, and of the candidates. `prompt_title` in `items.parquet` is
the title as it is cut for prompts.

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(base)

def listed(numbers, marks):
    titles = items.loc[numbers, "prompt_title"]
    return prompt["separator"].join(f"({mark}) {title}" for mark, title in zip(marks, titles))

def letter_logits(history, candidates):
    history = history[-prompt["max_history"]:]
    text = (
        prompt["before_history"] + listed(history, range(1, len(history) + 1))
        + prompt["before_candidates"] + listed(candidates, prompt["letters"])
        + prompt["after_candidates"]
    )
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    return logits[prompt["letter_token_ids"][:len(candidates)]]
```

The same works with any engine that returns the log-probabilities of given tokens after a prompt:
they differ from the logits by a constant.
"""

TITLES = """
`title_log_likelihood` is the log-likelihood of a candidate's title after the heading and the titles
of the history, the last `max_history` items; `title_log_likelihood_without_history` is that after
the heading alone, and `title_tokens` the number of its tokens. `title_token_ids` in `items.parquet`
are the tokens of a title with its line end.

```python
def log_likelihood(history, candidate):
    before = prompt["heading_token_ids"] + [
        token for item in history[-prompt["max_history"]:] for token in items.title_token_ids[item]
    ]
    title = list(items.title_token_ids[candidate])
    with torch.no_grad():
        logits = model(torch.tensor([before + title])).logits[0, len(before) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(title)[:, None]).sum().item()
```
"""

FORKS = Template("""
At each fork of the prefix tree of all titles (`title_token_ids` in `items.parquet`), the next token
has the probability

    q(t) = softmax over the tokens that continue a title of (a z(t) + b log p(t))

where z are the language model's logits after the heading, the titles of the history (the last
`max_history` items) and the title so far, p is the $prior of all items that
continue with t, and a and b are exp of `log_prior_weights` in `adapter/prior_weights.safetensors`.
The log-probability of an item is the sum of log q along its title. We know of no other library with
this computation; `recommend.py` does it for single users and for tables.
""")

WITH_RETRIEVER = """
`title_log_ratio` is what the language model adds to the retriever's log-probability of an item.
""" + FORKS.substitute(prior="retriever's probability")

WITH_POPULARITY = """
`title_log_probability` is an item's log-probability by the language model, which knows how popular
items are, and `log_popularity` the logarithm of its training interactions plus one.
""" + FORKS.substitute(prior="popularity")

DETAILS = {  # by what the scores come from
    "letters": LETTERS,
    "titles, retriever": WITH_RETRIEVER,
    "titles, popularity": WITH_POPULARITY,
    "titles, none": TITLES,
}


def readme(
    run_dir: Path,
    data: SequenceDataset,
    *,
    max_len: int,
    mask_history: bool,
    base_model: str | None = None,
    scores: str | None = None,
) -> str:
    """The README of an export.

    Args:
        run_dir: the run.
        data: its data set.
        max_len: length of the histories that the retriever takes.
        mask_history: whether the items of a history are excluded.
        base_model: the ranker's language model.
        scores: where the ranker's scores come from, a key of ``DETAILS``; None for a retriever.
    """
    text = RETRIEVER.substitute(
        run=run_dir,
        code=data.code,
        num_users=f"{data.num_users:,}",
        num_items=f"{data.num_items:,}",
        max_len=max_len,
        masking=MASKED if mask_history else NOT_MASKED,
    )
    if scores is None:
        return text
    return text + RANKER.substitute(base_model=base_model) + DETAILS[scores]
