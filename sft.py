"""sft: a model learns from a fixed data set.

Two steps. `prepare` turns any data set into one Arrow file of token ids, and marks the tokens that the assistant would
have to write: the only ones that are learned. `train` takes rows from it, packs them without padding, and runs them
over whatever layout of parallel.py there is. With --loss dpo the rows are pairs, and the better of two answers gains.

    jsonl, Arrow, parquet, hub         F.arrow                          one micro-batch
    +---------------------+            +--------------------------+     tokens     u u a a . u a a a . u u u a .
    | problem, solution   |  template  | input_ids   u u u a a .  |     positions  0 1 2 3 4 0 1 2 3 4 0 1 2 3 4
    | question, answer    | ---------> | loss_mask   0 0 0 1 1 1  |     predict      ^ ^ ^   ^ ^ ^ ^       ^ ^
    | messages, prompt .. |  tokenizer | held_out    no           |     cu_seqlens 0 5 10 15: attention ends there
    | chosen, rejected    |            +--------------------------+     (u: user's, a: assistant's, .: end of turn)
    +---------------------+              select(rows) of a list column IS a packed batch: its values, its offsets

A step is `batch` rows, whatever the layout: they are spread over the micro-batches of all data-parallel ranks so that
each has the same number of tokens, and every sum is divided by the step's own count of learned tokens. The order of
the rows is a function of (seed, epoch), the learning rate one of the step. So, beside weights and optimizer, a
checkpoint needs no more than the number of its step to go on bit by bit.

Public names: prepare, Chat; pack, rows_of_step, Examples; sft_loss, dpo_loss; Trainer, train. What any training run
needs, ppo.py's too: arguments, claim, cosine, Metrics, curves, peak_flops, memory_gb.

    python sft.py                                                              the demo
    python sft.py prepare --data NotASI/NuminaMath-CoT-Small-Hard-200k --model M --out F.arrow
    python sft.py --model M --data F.arrow --out DIR                           one GPU
    torchrun --nproc-per-node 8 sft.py --model M --data F.arrow --out DIR --tp 2 --pp 2
    python sft.py bench                                                        a GPU: against a plain transformers loop
"""
from __future__ import annotations

import contextlib, functools, hashlib, importlib.util, itertools, json, math, os, re, resource
import shutil, sys, tempfile, time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser

import arrowlite as al
import parallel

INSTRUCTION = "Work step by step and put the final answer inside \\boxed{}."       # evaluate.py asks in the same words

@dataclass
class Prepare:
    """The defaults are those of the full pipeline: 181k problems of NuminaMath, of which 1k are held out."""
    data: str = "NotASI/NuminaMath-CoT-Small-Hard-200k"     # jsonl, arrow, parquet, a directory of them, or a hub id
    model: str = "Qwen/Qwen3-0.6B-Base"     # whose tokenizer and chat template are used
    out: str = "sft.arrow"                  # the file to write
    held_out: float = 1 / 180               # share of the prompts that validate and are never learned
    max_tokens: int = 8192                  # a row of more is skipped
    split: str = "train"                    # of a data set from the hub

@dataclass
class Config:
    """The defaults are those of the full pipeline: Qwen3-0.6B on NuminaMath, 2109 steps on eight GPUs."""
    model: str = "Qwen/Qwen3-0.6B-Base"     # a model directory or a hub id
    data: str = "sft.arrow"                 # what `prepare` wrote
    out: str = "sft"                        # the directory of the run
    # what is learned
    loss: Literal["sft", "dpo", "ipo"] = "sft"
    beta: float = 0.1                       # dpo, ipo: how dear it is to leave the reference
    label_smoothing: float = 0.0            # dpo: the share of pairs that may be the wrong way round
    length_normalized: bool = False         # dpo, ipo: logprobs a token, not an answer
    # how
    epochs: int = 3
    steps: Optional[int] = None             # end after so many steps, instead of after `epochs`
    batch: int = 256                        # rows (or pairs) a step, over all GPUs
    max_tokens: int = 8192                  # of a micro-batch
    lr: float = 5e-5                        # the highest
    min_lr: float = 5e-6                    # at the end of the cosine
    warmup: float = 0.1                     # share of the steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-3
    clip: float = 1.0                       # the largest gradient norm that a step is made with
    explode: float = 1e4                    # a gradient norm above this ends the run
    seed: int = 0
    # where
    dp: Optional[int] = None                # copies of the model; by default as many as there are GPUs for
    pp: int = 1                             # pipeline stages
    tp: int = 1                             # parts of each layer
    chunks: int = 1                         # stages a GPU; several interleave, and the pipeline is idle for less
    recompute: bool = False                 # activations a second time in the backward pass, instead of keeping them
    device: Optional[str] = None            # cuda, cpu; otherwise a GPU if there is one
    dtype: Optional[Literal["bfloat16", "float32", "float64"]] = None       # otherwise what suits the device
    # what remains
    log_every: int = 1                      # steps from one printed line to the next; metrics.jsonl has them all
    eval_every: int = 100                   # steps from one validation to the next
    save_every: int = 100                   # steps from one checkpoint to the next
    keep: int = 2                           # checkpoints that are kept; 0: all
    resume: bool = False                    # go on with the run in `out`
    wandb: Optional[str] = None             # a Weights & Biases project to report to

# --- rows: from the shapes that data sets have to conversations ------------------------------------------------------

def _turns(text: str | list, role: str) -> list[dict]:          # a list is of messages already
    return list(text) if isinstance(text, list) else [{"role": role, "content": text}]

def _math(problem: str, solution: str) -> list[dict]:
    return _turns(f"{problem}\n{INSTRUCTION}", "user") + _turns(solution, "assistant")

def _question(row: dict) -> list[dict]:
    """GSM8K ends an answer in "#### 72", after working with notes for a calculator in it, "<<48/2=24>>"."""
    working, mark, final = row["answer"].rpartition("\n####")
    if not mark:
        return _turns(row["question"], "user") + _turns(row["answer"], "assistant")
    return _math(row["question"], f"{re.sub('<<.*?>>', '', working)}\nThe answer is \\boxed{{{final.strip()}}}.")

def _pair(row: dict, name: str) -> list[dict]:
    """One of two answers to a prompt, or one of two conversations, which say the prompt themselves."""
    answer = _turns(row[name], "assistant")
    if answer and answer[0]["role"] != "assistant":
        return answer
    if "problem" in row:
        return _math(row["problem"], "")[:1] + answer
    if not (prompt := row.get("prompt") or row.get("question")):
        raise ValueError(f"{name} begins with the assistant's turn, and there is no prompt, question or problem")
    return _turns(prompt, "user") + answer

def _prompt(messages: list[dict]) -> list[dict]:
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))

SHAPES = {              # columns, and the conversations in them; a row has the first shape of which it has all columns
    ("chosen", "rejected"): lambda row: {name + "_": _pair(row, name) for name in ("chosen", "rejected")},
    ("problem", "solution"): lambda row: {"": _math(row["problem"], row["solution"])},      # NuminaMath-CoT, MATH
    ("question", "r1_solution_1"): lambda row:                          # DeepMath, without the thoughts
        {"": _math(row["question"], row["r1_solution_1"].split("</think>")[-1])},
    ("messages",): lambda row: {"": row["messages"]},
    ("question", "answer"): lambda row: {"": _question(row)},
    ("prompt", "response"): lambda row: {"": _turns(row["prompt"], "user") + _turns(row["response"], "assistant")},
}

def conversations(row: dict) -> dict[str, list[dict]]:
    """{"": messages}, or for a pair {"chosen_": messages, "rejected_": messages}."""
    for columns, read in SHAPES.items():
        if all(row.get(name) is not None for name in columns):
            return read(row)
    raise ValueError(f"none of the known shapes, {' | '.join(', '.join(s) for s in SHAPES)}; it has {', '.join(row)}")

class Chat:
    """A tokenizer's chat template, and which of the tokens that it makes of a conversation are the assistant's.

    Those are what it has to write after the prompt of a generation (thinking off), up to the mark that ends its turn:
        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
                                                                                     ^^^^^^^^^^^^^^^
    The text is cut there and the pieces are tokenized one by one, so no token lies on a border: as when generating."""

    def __init__(self, tokenizer):
        self.tokenizer, self.special = tokenizer, tokenizer.all_special_tokens
        text = self.render([*_turns("question", "user"), *_turns("ANSWER", "assistant")])
        self.end = text.rpartition("ANSWER")[2].strip()         # <|im_end|>: not always tokenizer.eos_token
        if self.end not in tokenizer.get_vocab():
            raise ValueError("the chat template does not end an assistant's turn with one token; take another model")

    def render(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The text of a conversation, cut where the assistant begins and ends, and whether a piece is the assistant's.
        The borders are found in the whole text: templates render the last turn differently."""
        self._check(messages)
        messages = [m | {"content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
        text, cuts = self.render(messages), [0]
        text.encode()           # raises for this row alone, as the tokenizer would for all: half of a surrogate pair
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                heads = (self.render(messages[:k], add_generation_prompt=True, **options)
                         for options in ({"enable_thinking": False}, {}))       # Qwen3: the last turn, and those before
                start = next((len(head) for head in heads if text.startswith(head)), None)
                if start is None:
                    raise ValueError(f"the chat template writes turn {k} differently than the prompt to generate it")
                cuts += [start, text.index(self.end, start) + len(self.end)]
        return [(text[a:b], i % 2 == 1) for i, (a, b) in enumerate(itertools.pairwise([*cuts, len(text)]))]

    def _check(self, messages: list[dict]) -> None:
        if not messages:
            raise ValueError("the conversation has no turns")
        for message in messages:
            if not isinstance(message.get("content"), str) or not message["content"].strip():
                raise ValueError(f"the {message.get('role')}'s turn has no text")
            if marks := [token for token in self.special if token in message["content"]]:   # one may end the turn
                raise ValueError(f"the text has a special token in it, {marks[0]}")
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last turn is not the assistant's")

    def encode(self, documents: list[list[tuple[str, bool]]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids, mask) of each; the tokenizer spreads the pieces of all of them over the CPU's cores."""
        texts = [text for pieces in documents for text, _ in pieces]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        encoded = []
        for pieces in documents:
            parts = [next(encodings).ids for _ in pieces]
            mask = np.repeat([learned for _, learned in pieces], [len(part) for part in parts])
            encoded.append((np.array(list(itertools.chain(*parts)), np.int32), mask.astype(np.uint8)))
        return encoded

# --- prepare: a data set becomes an Arrow file -----------------------------------------------------------------------

def read_rows(data: str, split: str = "train"):
    """(where it stands, row) one by one. A line of jsonl is not parsed yet: a bad one is only skipped."""
    path, kinds = Path(data), (".jsonl", ".arrow", ".parquet")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in kinds)
        if not files:
            raise FileNotFoundError(f"{data} has no {', '.join(kinds)} files in it")
        for file in files:
            yield from read_rows(str(file))
    elif path.suffix in (".jsonl", ".json") and path.exists():
        with open(path, "rb") as lines:
            yield from ((f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip())
    elif path.suffix == ".parquet" and path.exists():
        import pyarrow.parquet
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        rows = itertools.chain.from_iterable(al.Table.from_arrow(batch) for batch in batches)
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    elif path.exists():
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(al.read(path)))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data) and path.suffix not in kinds:
        import datasets
        rows = datasets.load_dataset(data, split=split, streaming=True)
        yield from ((f"{data}, row {i}", row) for i, row in enumerate(rows))
    else:
        raise FileNotFoundError(f"{data} is neither a file, nor a directory, nor a data set's hub id such as org/name")

def is_held_out(messages: list[dict], share: float) -> bool:
    """By a hash of the prompt, whatever its spaces and capitals: with two solutions it is on one side, and on the same
    side of every data set that it is in."""
    text = " ".join(" ".join(message["content"].lower().split()) for message in _prompt(messages))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64

def check_pair(chosen: list[dict], rejected: list[dict]) -> None:
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    if _prompt(chosen) != _prompt(rejected):
        raise ValueError("chosen and rejected answer different prompts")

def tokenize(chat: Chat, rows: list, held_out: float, max_tokens: int):
    """(where, what `prepare` writes of this row, or in words why it cannot be used)."""
    parsed = []
    for where, row in rows:
        try:
            talks = conversations(json.loads(row) if isinstance(row, bytes) else row)
            if len(talks) == 2:
                check_pair(*talks.values())
            documents = {prefix: chat.pieces(messages) for prefix, messages in talks.items()}
            parsed.append((where, is_held_out(next(iter(talks.values())), held_out), documents))
        except Exception as error:                      # a row can be wrong in more ways than there are names for
            yield where, f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    encoded = iter(chat.encode([pieces for _, _, documents in parsed for pieces in documents.values()]))
    for where, held, documents in parsed:
        record, total = {"held_out": held}, 0
        for prefix in documents:
            ids, mask = next(encoded)
            record |= {prefix + "input_ids": ids, prefix + "loss_mask": mask}
            total += len(ids)
        yield where, record if total <= max_tokens else f"{total:,} tokens are more than max_tokens={max_tokens}"

def prepare(data: str, model, out: str, held_out: float = 1 / 180, max_tokens: int = 8192,
            split: str = "train") -> Counter:
    """Write the Arrow file that `train` takes: input_ids list<int32>, loss_mask list<uint8>, held_out bool; of pairs,
    chosen_input_ids, rejected_input_ids and so on. `model` is a tokenizer or where to find one. A row that cannot be
    used is named and counted; a data set of which half the rows are so is refused. Rows stream through, 1000 a time."""
    if not 0 <= held_out <= 1:
        raise ValueError(f"--held_out {held_out} is a share, and should be from 0 to 1")
    chat = Chat(AutoTokenizer.from_pretrained(model) if isinstance(model, (str, Path)) else model)
    rows, counts, skipped, writer = read_rows(data, split), Counter(), [], None
    with contextlib.ExitStack() as stack, tqdm(desc=f"prepare {out}", unit=" rows") as bar:
        while group := list(itertools.islice(rows, 1000)):
            records = []
            for where, result in tokenize(chat, group, held_out, max_tokens):
                if isinstance(result, dict) and not writer:
                    types = {name: "bool" if name == "held_out" else f"list<{x.dtype}>" for name, x in result.items()}
                    metadata = {"tokens_below": str(len(chat.tokenizer)), "end_of_turn": chat.end}
                    writer = stack.enter_context(al.Writer(out, al.Schema(types, metadata)))
                if isinstance(result, dict) and list(result) == writer.schema.names:
                    records.append(result)
                    continue
                why = "pairs and single answers cannot stand in one file" if isinstance(result, dict) else result
                skipped.append(f"{where}: {why}")
                if len(skipped) <= 10:
                    bar.write(f"skipped {skipped[-1]}", sys.stderr)
            if records:
                writer.write({name: [record[name] for record in records] for name in records[0]})
            counts.update(rows=len(records), skipped=len(group) - len(records),
                          held_out=sum(record["held_out"] for record in records),
                          tokens=sum(len(x) for r in records for name, x in r.items() if name.endswith("input_ids")))
            bar.update(len(group))
        if counts["skipped"] >= counts["rows"]:                 # raised in here, so that the file does not appear
            raise ValueError(f"{len(skipped):,} of {len(skipped) + counts['rows']:,} rows of {data} cannot be used, "
                             f"the first for this reason: {skipped[0]}" if skipped else f"{data} has no rows")
    return counts

# --- batches: rows of the file to packed tokens ----------------------------------------------------------------------

def pack(lengths, capacity: int, multiple: int = 1) -> list[list[int]]:
    """Spread rows over as few micro-batches of at most `capacity` tokens as will do (a multiple of `multiple`, as many
    for each rank), so that all get about the same number of tokens. Longest first, always into the emptiest; where
    that does not fit, into the first that has room, which wastes less but leaves the last one half empty."""
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a row of {lengths.max():,} tokens does not fit into micro-batches of {capacity:,}; "
                         f"raise --max_tokens, or prepare the data with --max_tokens {capacity}")
    order = np.argsort(-lengths, kind="stable").tolist()
    least = -(-int(lengths.sum()) // (capacity * multiple)) * multiple
    for count in itertools.count(max(least, multiple), multiple):
        for emptiest in (True, False):
            loads, bins = np.zeros(count, np.int64), [[] for _ in range(count)]
            for row in order:
                b = int(loads.argmin() if emptiest else (loads + lengths[row] <= capacity).argmax())    # no room: 0
                loads[b] += lengths[row]
                bins[b].append(row)
            if loads.max() <= capacity:
                return bins

@functools.lru_cache(2)         # at the end of an epoch the next step is of the next one already
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)

def rows_of_step(step: int, rows: int, batch: int, seed: int) -> np.ndarray:
    """Which of the `rows` rows step `step` learns from. Each epoch has an order of its own, and leaves out the few rows
    at its end that do not fill a step."""
    epoch, at = divmod(step, max(1, rows // batch))
    return _order(rows, seed, epoch)[at * batch : (at + 1) * batch]

class Examples:
    """The rows of a prepared file. Nothing is read before it is asked for: the file is mapped into memory."""

    def __init__(self, path: str, pairs: bool = False):
        make = f"python sft.py prepare --data {'PAIRS' if pairs else 'SRC'} --model M --out F.arrow"
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path} to learn from; make one with: {make}")
        self.path, self.table = path, al.read(path)
        self.prefixes = ("chosen_", "rejected_") if pairs else ("",)
        names, parts = self.table.column_names, ("input_ids", "loss_mask")
        if missing := {prefix + part for prefix in self.prefixes for part in parts} - set(names):
            raise ValueError(f"{path} has no column {min(missing)!r} but {', '.join(names)}; make it with: {make}")
        self.documents, masks = (np.stack([self._lengths(prefix + part) for prefix in self.prefixes], 1)
                                 for part in parts)                                 # tokens in each, [rows, 1 or 2]
        if (bad := ((self.documents != masks) | (self.documents < 1)).any(1)).any():
            raise ValueError(f"row {bad.argmax()} of {path} is empty, or its mask of another length; prepare it again")
        self.lengths = self.documents.sum(1)                                        # [rows]
        metadata = {key.decode(): value.decode() for key, value in self.table.schema.metadata.items()}
        self.tokens_below, self.end_of_turn = int(metadata.get("tokens_below", 0)), metadata.get("end_of_turn")
        self.reference = metadata.get("reference")
        held = self.table["held_out"].to_numpy() if "held_out" in names else np.zeros(len(self.table))
        self.held_out, self.learned = np.flatnonzero(held), np.flatnonzero(held == 0)           # numbers of rows

    def _lengths(self, name: str) -> np.ndarray:
        return np.concatenate([np.diff(a.used()[0]) for a in self.table[name].batches()] or [np.zeros(0, np.int64)])

    def gather(self, name: str, rows) -> tuple[np.ndarray, np.ndarray]:
        """A list column of these rows (of pairs first all chosen) end to end, and their bounds, [documents + 1]."""
        parts = [self.table[prefix + name].select(rows).combine().used() for prefix in self.prefixes]
        bounds = np.concatenate([[0], *(np.diff(offsets) for offsets, _ in parts)]).cumsum()
        return np.concatenate([values.to_numpy() for _, values in parts]), bounds

    def mask(self, rows) -> np.ndarray:
        """Which tokens are learned; never a document's first, before which there is nothing to predict it from."""
        mask, bounds = self.gather("loss_mask", rows)
        mask = mask.astype(bool)
        mask[bounds[:-1]] = False
        return mask

    def micro_batch(self, rows, count: int, device) -> dict:
        """Packed, on its way to the device. The prediction of a token is made from the hidden state before it, so the
        head is only applied there: `predict` are those places, `targets` the tokens that come next."""
        tokens, bounds = self.gather("input_ids", rows)
        mask = self.mask(rows)
        predict = np.flatnonzero(mask) - 1
        arrays = {"tokens": tokens.astype(np.int64), "cu_seqlens": bounds.astype(np.int32), "predict": predict,
                  "positions": np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds)),
                  "targets": tokens[predict + 1].astype(np.int64)}
        if len(self.prefixes) > 1:
            arrays["answers"] = np.add.reduceat(mask, bounds[:-1], dtype=np.int64)              # [2 * pairs] tokens
            if self.reference:
                arrays["reference"] = np.concatenate([self.table[p + "reference"].select(rows).to_numpy()
                                                      for p in self.prefixes])                  # [2 * pairs]
        batch = {name: _to(torch.from_numpy(a), device) for name, a in arrays.items()}
        return batch | {"count": count, "max_seqlen": int(np.diff(bounds).max()), "rows": rows}

    def keep_reference(self, logprobs: np.ndarray, identity: str) -> None:
        """Write the file again with what the reference says of each answer, [rows, 2]."""
        table = self.table
        for prefix, column in zip(self.prefixes, logprobs.T):
            table = table.with_column(prefix + "reference", column)
        metadata = self.table.schema.metadata | {b"reference": identity.encode()}
        with al.Writer(self.path, al.Schema(list(table.schema), metadata)) as writer:
            writer.write(table)

def _to(x: Tensor, device) -> Tensor:
    """Without waiting: a pinned copy is read by the device when it gets there."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x

# --- losses: sums over a micro-batch, divided by the count of the whole step -----------------------------------------

def logprobs(model, hidden: Tensor, batch: dict) -> Tensor:
    """Of the learned tokens, [learned]."""
    return model.logprobs(hidden.index_select(0, batch["predict"]), batch["targets"])[0]

def sft_loss(model, hidden: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """The mean over all learned tokens of the step of -log p(token). Every token counts the same, however the step is
    cut into micro-batches."""
    loss = -logprobs(model, hidden, batch).sum() / batch["count"]
    return loss, {"loss": loss.detach()}

def answer_logprobs(model, hidden: Tensor, batch: dict) -> Tensor:
    """Sums over each answer, [2 * pairs], always in one order; unsafe: without a check that waits for the GPU."""
    return torch.segment_reduce(logprobs(model, hidden, batch), "sum", lengths=batch["answers"], unsafe=True)

def dpo_loss(model, hidden: Tensor, batch: dict, kind: str = "dpo", beta: float = 0.1, label_smoothing: float = 0.0,
             length_normalized: bool = False) -> tuple[Tensor, dict]:
    """DPO (Rafailov et al. 2023, eq. 7) and IPO (Azar et al. 2023, eq. 17). The reward of an answer is how much
    likelier it is than under the reference; that of the chosen one has to be the higher."""
    ratio = answer_logprobs(model, hidden, batch) - batch["reference"]                          # [2 * pairs]
    if length_normalized:
        ratio = ratio / batch["answers"]
    chosen, rejected = ratio.chunk(2)
    margin = chosen - rejected                                                                  # [pairs]
    if kind == "ipo":           # towards a fixed margin, so that pairs that agree do not drive it to infinity
        losses = (margin - 1 / (2 * beta)) ** 2
    else:                       # -log of the probability that the better one is the better one
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    each = {"loss": losses, "accuracy": margin > 0, "margin": beta * margin, "reward": beta * chosen}
    means = {name: x.detach().double().sum() / batch["count"] for name, x in each.items()}
    return losses.sum() / batch["count"], means

# --- what a run needs: its directory, its schedule, its numbers ------------------------------------------------------

def arguments(kind: type, args: list[str] | None = None):
    """A Config from the command line; an unknown flag is an error."""
    return kind(**vars(HfArgumentParser(kind).parse_args(args)))

RANGES = {"at least 1": lambda x: x >= 1, "at least 0": lambda x: x >= 0, "above 0": lambda x: x > 0,
          "from 0 to 1": lambda x: 0 <= x <= 1, "at least 0 and below 1": lambda x: 0 <= x < 1,
          "finite": math.isfinite}

def check_ranges(config, names: dict[str, str]) -> None:
    """Refuse numbers that make no sense, of which most would be taken in silence; NaN is in no range."""
    for words, of in names.items():
        for name in of.split():
            value = getattr(config, name)
            if value is not None and not RANGES[words](value):
                raise ValueError(f"--{name} {value} should be {words}")

NUMBERS = {"at least 1": "epochs steps batch max_tokens dp pp tp chunks log_every eval_every save_every",
           "at least 0": "keep weight_decay lr min_lr seed", "above 0": "beta clip explode",
           "from 0 to 1": "warmup label_smoothing", "at least 0 and below 1": "beta1 beta2"}
FREE = {"out", "max_tokens", "dp", "pp", "tp", "chunks", "recompute", "device", "log_every", "eval_every", "save_every",
        "keep", "resume", "wandb"}      # settings that do not change what is computed, but for rounding

def claim(config, free: set[str] = FREE) -> None:
    """Make `config.out` the directory of this run. One that holds a run already is only taken to go on with that run,
    with the same settings but for the free ones, which do not change what is computed."""
    if config.wandb and not importlib.util.find_spec("wandb"):
        raise ValueError(f"--wandb {config.wandb} needs a package that is not there: pip install wandb")
    out, saved, old = Path(config.out), Path(config.out, "config.json"), {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        old = json.loads(saved.read_text())
    if saved.exists() and not {"model", "data", "out"} <= set(old):     # a model's, which a run must not replace
        raise ValueError(f"{saved} is not a run's but something else's, a model's perhaps; choose another --out")
    if saved.exists() and not config.resume:
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or choose another --out")
    now = {name: value for name, value in asdict(config).items() if name in old.keys() - free}
    changed = [f"{name} was {old[name]}, now {new}" for name, new in now.items() if old[name] != new]
    if changed:
        raise ValueError(f"{out} holds a run with other settings: {'; '.join(changed)}; use the same to resume it")
    if dist.is_initialized():
        dist.barrier()                          # all have looked before one writes
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(asdict(config), indent=2) + "\n")
        print("settings:", ", ".join(f"{name}={value}" for name, value in asdict(config).items()))

def cosine(step: int, steps: int, warmup: float, lr: float, min_lr: float) -> float:
    """The learning rate of a step, from 0 on: a line up for the share `warmup` of all steps, then a cosine down."""
    rise = round(warmup * steps)
    if step < rise:
        return lr * (step + 1) / rise
    share = (step - rise) / max(1, steps - 1 - rise)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2

def peak_flops(device) -> float | None:
    """Operations a second in bf16, without sparsity, by the data sheets; None where they are not known."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    peaks = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
    return next((peak for gpu, peak in peaks.items() if gpu in name), None)

def memory_gb(device) -> float:
    """The most that this process has used so far: of the GPU's memory, or of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

FORMATS = {"lr": "lr {:.2e}", "tokens": "{:,} tokens", "tokens_per_s": "{:,.0f} tok/s", "mfu": "mfu {:.1%}",
           "memory_gb": "{:.1f} GB", "seconds": "{:.2f} s", "accuracy": "accuracy {:.1%}"}

class Metrics:
    """What a run says of itself: a progress bar, a line a step, metrics.jsonl, curves.png. Only rank 0 says it."""

    def __init__(self, config, steps: int, start: int = 0):
        self.out, self.steps, self.every, self.wandb = Path(config.out), steps, config.log_every, None
        self.silent = dist.is_initialized() and dist.get_rank() != 0
        self.bar = tqdm(total=steps, initial=start, desc=self.out.name, disable=self.silent, unit=" steps")
        if self.silent:
            return
        path = self.out / "metrics.jsonl"       # less what a killed run wrote after its last checkpoint: it comes again
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        def kept(line):                         # a validation with a line of its own follows the checkpoint of its step
            values = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            alone = all(name == "step" or name.startswith("val_") for name in values)
            return values["step"] < start or values["step"] == start and not alone
        path.write_text("".join(filter(kept, lines)))
        self.file = open(path, "a", buffering=1)
        if config.wandb:
            import wandb
            self.wandb = wandb.init(project=config.wandb, name=self.out.name, config=asdict(config), resume="allow")

    def log(self, step: int, **values) -> None:
        """`step` steps are done. A value that is None is not there."""
        if self.silent:
            return
        values = {name: value for name, value in values.items() if value is not None}
        self.file.write(json.dumps({"step": step} | values) + "\n")
        if step % self.every == 0 or step == self.steps:
            words = [FORMATS.get(name, name + " {:.4g}").format(value) for name, value in values.items()]
            self.bar.write(" | ".join([f"step {step:>{len(str(self.steps))}}/{self.steps}", *words]), sys.stdout)
        self.bar.update(step - self.bar.n)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        self.bar.close()
        if not self.silent:
            self.file.close()
            curves(self.out)

def curves(out) -> None:
    """curves.png from metrics.jsonl: a panel for each number, val_x in that of x."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    panels = {}                                                 # {panel: {name: [(step, value), ...]}}
    for line in map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines()):
        for name in line.keys() - {"step"}:
            panels.setdefault(name.removeprefix("val_"), {}).setdefault(name, []).append((line["step"], line[name]))
    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, 3 * rows), squeeze=False, layout="constrained")
    for axis, (panel, series) in itertools.zip_longest(axes.flat, sorted(panels.items()), fillvalue=("", {})):
        axis.set_title(panel)
        axis.set_visible(bool(series))
        for name, points in sorted(series.items()):
            axis.plot(*zip(*points), label=name, marker="o" if name.startswith("val_") else None, markersize=3)
        if len(series) > 1:
            axis.legend(frameon=False)
    figure.savefig(Path(out, "curves.png"), dpi=80)
    plt.close(figure)

# --- training --------------------------------------------------------------------------------------------------------

@dataclass
class Step:
    """What a step learns from: its rows (of all ranks), how many tokens of them are learned, this rank's part."""
    rows: np.ndarray
    targets: int
    batches: list[dict]

class Trainer:
    """A model, its optimizer and the rows to learn from, on one rank of whatever mesh there is."""

    def __init__(self, config: Config):
        check_ranges(config, NUMBERS)
        self.config, self.mesh = config, parallel.init(config.dp, config.pp, config.tp, config.device)
        self.examples = Examples(config.data, pairs=config.loss != "sft")
        dtype = getattr(torch, config.dtype) if config.dtype else None
        self.model = parallel.Qwen3.from_pretrained(config.model, self.mesh, dtype=dtype, chunks=config.chunks,
                                                    recompute=config.recompute)
        self.optimizer = parallel.AdamW(self.model, config.lr, (config.beta1, config.beta2),
                                        weight_decay=config.weight_decay, clip=config.clip)
        self.check()
        self.end_turns()
        self.loss, self.names, self.ahead = sft_loss, ("loss",), None       # ahead: the next Step, once it is there
        if config.loss != "sft":
            self.loss = functools.partial(dpo_loss, kind=config.loss, beta=config.beta,
                                          label_smoothing=config.label_smoothing,
                                          length_normalized=config.length_normalized)
            self.names = ("loss", "accuracy", "margin", "reward")
        self.batch = min(config.batch, len(self.examples.learned))
        self.data = [len(self.examples.lengths), int(self.examples.lengths.sum())]      # what tells files apart
        self.steps = config.steps or config.epochs * (len(self.examples.learned) // self.batch)

    def check(self) -> None:
        """Before the directory of the run is taken."""
        config, examples, model = self.config, self.examples, self.model.config
        if config.min_lr > config.lr:
            raise ValueError(f"--min_lr {config.min_lr}, where --lr {config.lr} ends, should not be above it")
        if len(examples.learned) == 0:
            raise ValueError(f"{config.data} has no rows to learn from; prepare it with a smaller --held_out")
        if examples.tokens_below > model.vocab_size:
            raise ValueError(f"{config.data} has tokens up to {examples.tokens_below:,} and {config.model} knows "
                             f"{model.vocab_size:,}; prepare it with --model {config.model}")
        if examples.documents.max() > (most := model.max_position_embeddings):
            raise ValueError(f"{config.data} has a row of {examples.documents.max():,} tokens, and {config.model} has "
                             f"{most:,} positions; prepare it with --max_tokens {most}")
        pack([examples.lengths.max()], config.max_tokens)           # raises if the longest row fits no micro-batch

    def end_turns(self) -> None:
        """Let generation end where the assistant's turn does, which a base model's own settings do not: change the
        files that are saved beside the weights."""
        if self.mesh.rank > 0 or not (end := self.examples.end_of_turn):
            return
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for name, content in ({"config.json": self.model.config.to_json()} | self.model.files).items():
                (folder / name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.eos_token = end
            tokenizer.save_pretrained(folder)
            for file in (folder / "config.json", folder / "generation_config.json"):
                settings = json.loads(file.read_text()) if file.exists() else {}
                file.write_text(json.dumps(settings | {"eos_token_id": tokenizer.eos_token_id}, indent=2) + "\n")
            self.model.files = parallel.small_files(folder)

    def step(self, rows: np.ndarray) -> Step:
        examples, mesh, targets = self.examples, self.mesh, int(self.examples.mask(rows).sum())
        count = targets if len(examples.prefixes) == 1 else len(rows)       # losses are means over tokens, or pairs
        bins = pack(examples.lengths[rows], self.config.max_tokens, mesh.dp)[mesh.dp_rank :: mesh.dp]
        return Step(rows, targets, [examples.micro_batch(rows[b], count, mesh.device) for b in bins if b])

    def step_after(self, done: int) -> Step:
        rows = self.examples.learned
        return self.step(rows[rows_of_step(done, len(rows), self.batch, self.config.seed)])

    def totals(self, results: list[dict]) -> Tensor:
        """The sums over all micro-batches of all ranks, [names], still on the device."""
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.mesh.device)
        for result in results if self.mesh.tp_rank == 0 else []:        # there are none but on the last stage
            sums += torch.stack([result[name].double() for name in self.names])
        if self.mesh.size > 1:
            dist.all_reduce(sums)
        return sums

    def add_reference(self) -> None:
        """The reference's logprob of every answer, computed once for a model and a file, and kept in the file."""
        config, mesh, files = self.config, self.mesh, parallel.local_folder(self.config.model).glob("*.safetensors")
        identity = f"{config.model} {sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)}"
        if self.examples.reference == identity:
            return
        values = torch.zeros(len(self.examples.lengths), 2, dtype=torch.float64)
        def score(model, hidden, batch):
            return None, {"rows": batch["rows"], "logprobs": answer_logprobs(model, hidden, batch)}
        for start in tqdm(range(0, len(values), config.batch), "reference", disable=mesh.rank > 0):
            step = self.step(np.arange(start, min(start + config.batch, len(values))))
            results = parallel.run(self.model, step.batches, score, backward=False)
            for result in results if mesh.tp_rank == 0 else []:
                values[result["rows"]] = result["logprobs"].view(2, -1).T.double().cpu()
        if mesh.size > 1:
            dist.all_reduce(values)
        if mesh.rank == 0:
            self.examples.keep_reference(values.numpy(), identity)
        if mesh.size > 1:
            dist.barrier()
        self.examples = Examples(config.data, pairs=True)

    def validate(self) -> dict:
        rows = self.examples.held_out
        if len(rows) == 0:
            return {}
        sums = self.totals(parallel.run(self.model, self.step(rows).batches, self.loss, backward=False))
        return {"val_" + name: value for name, value in zip(self.names, sums.tolist())}

    def speed(self, step: Step, seconds: float) -> dict:
        """For the MFU: 6 operations a weight and token, and causal attention; the head only where it is applied."""
        lengths, model = self.examples.documents[step.rows].ravel(), self.model.config
        tokens, peak = int(lengths.sum()), peak_flops(self.mesh.device)
        flops = parallel.training_flops(model, lengths.tolist())
        flops -= 6 * (tokens - step.targets) * model.vocab_size * model.hidden_size
        return {"tokens": tokens, "tokens_per_s": tokens / seconds, "memory_gb": memory_gb(self.mesh.device),
                "mfu": peak and flops / seconds / peak / self.mesh.size, "seconds": seconds}

    def save(self, done: int) -> None:
        out = Path(self.config.out)
        parallel.save(out / f"step-{done:06d}", self.model, self.optimizer, {"step": done, "data": self.data})
        if self.mesh.rank == 0:
            for old in sorted(out.glob("step-*"))[: -self.config.keep]:
                shutil.rmtree(old)

    def guard(self, number: int, step: Step, loss: float, norm: float) -> None:
        """End the run before it saves what a NaN or an explosion has been through."""
        if math.isfinite(loss) and norm < self.config.explode:
            return
        out, words = self.config.out, f"step {number}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if self.mesh.rank == 0:
            Path(out, "stopped.json").write_text(json.dumps({"why": words, "rows": step.rows.tolist()}) + "\n")
        raise FloatingPointError(f"{words}, learning from the rows {', '.join(map(str, step.rows[:8]))}, ... of "
                                 f"{self.config.data} (all of them: {out}/stopped.json); the last checkpoint is "
                                 f"{parallel.latest(out)}")

    def learn(self, number: int) -> dict:
        """Step `number`, counted from 1."""
        begin, step = time.perf_counter(), self.ahead or self.step_after(number - 1)
        sums = self.totals(parallel.run(self.model, step.batches, self.loss))
        self.ahead = self.step_after(number)            # the next one, while the GPU is still at what it was told to do
        lr = cosine(number - 1, self.steps, self.config.warmup, self.config.lr, self.config.min_lr)
        norm = self.optimizer.step(lr).item()           # waits for the gradients; the update itself is not waited for
        values = dict(zip(self.names, sums.tolist())) | {"grad_norm": norm, "lr": lr}
        self.guard(number, step, values["loss"], norm)
        return values | self.speed(step, time.perf_counter() - begin)

    def run(self) -> dict:
        config, values = self.config, {}
        found = config.resume and parallel.latest(config.out)
        state = parallel.load(found, self.model, self.optimizer) if found else {}
        if state.get("data", self.data) != self.data:
            raise ValueError(f"{config.data} is not the file that {found} has learned from: it has other rows")
        start = state.get("step", 0)
        metrics = Metrics(config, self.steps, start)
        for number in range(start + 1, self.steps + 1):
            values = self.learn(number)
            if number % config.eval_every == 0 or number == self.steps:
                values |= self.validate()
            metrics.log(number, **values)
            if number % config.save_every == 0 or number == self.steps:
                self.save(number)
        self.model.save_pretrained(Path(self.config.out, "model"))
        metrics.close()
        return values

def train(config: Config) -> dict:
    """A whole run. Returns the numbers of its last step, on every rank."""
    trainer = Trainer(config)
    claim(config)
    if config.loss != "sft":
        trainer.add_reference()
    return trainer.run()

# --- the demo, and a race --------------------------------------------------------------------------------------------

def demo() -> None:
    """A model of 0.1M parameters, random at first, learns to add three numbers and is examined on sums that it has not
    seen. Then it learns, from pairs of a right and a wrong answer, to tell them apart."""
    from evaluate import arithmetic, evaluate
    torch.set_num_threads(1)                                    # such small matrices are not worth waking others up
    with tempfile.TemporaryDirectory() as folder:
        def path(name): return str(Path(folder, name))
        rows = arithmetic(3000)
        pairs = [{"problem": row["problem"], "chosen": row["solution"],
                  "rejected": row["solution"].replace(f"{{{row['answer']}}}", f"{{{int(row['answer']) + 1}}}")}
                 for row in rows[:400]]
        for name, some in (("rows", rows), ("pairs", pairs)):
            Path(path(f"{name}.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in some))
        parallel.tiny_model(path("tiny"), hidden_size=64, num_hidden_layers=2)
        print("prepared:", dict(prepare(path("rows.jsonl"), path("tiny"), path("rows.arrow"), held_out=0.05)))
        sft = train(Config(path("tiny"), path("rows.arrow"), path("sft"), epochs=2, batch=16, lr=3e-3, min_lr=3e-4,
                           log_every=30))
        _, summary = evaluate(path("sft/model"), arithmetic(200, seed=1, held_out=True), max_tokens=64)
        prepare(path("pairs.jsonl"), path("sft/model"), path("pairs.arrow"), held_out=0.1)
        dpo = train(Config(path("sft/model"), path("pairs.arrow"), path("dpo"), loss="dpo", epochs=1, batch=16, lr=3e-4,
                           log_every=5))
    (score, error), accuracy = summary["pass@1"], dpo["val_accuracy"]
    print(f"sft: loss {sft['loss']:.3f}, held out {sft['val_loss']:.3f}; {score:.1%} (+- {error:.1%}) of unseen sums\n"
          f"dpo: {accuracy:.1%} of held-out pairs told apart, by a margin of {dpo['val_margin']:.2f}")
    assert score > 0.4 and accuracy == 1.0, "the demo has not learned what it learns elsewhere"

def plain_step(model, optimizer, documents: list, capacity: int) -> None:
    """A step as one writes it first with transformers, of (ids, mask): rows padded to the longest of their micro-batch,
    and as many in it as fit into the same number of tokens."""
    groups, learned = [[]], sum(int(mask.sum()) for _, mask in documents)
    for document in documents:
        longest = max(len(ids) for ids, _ in [*groups[-1], document])
        if longest * (len(groups[-1]) + 1) > capacity:
            groups.append([])
        groups[-1].append(document)
    for group in groups:
        shape = len(group), max(len(ids) for ids, _ in group)
        tokens, present = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100)
        for i, (ids, mask) in enumerate(group):
            tokens[i, : len(ids)], present[i, : len(ids)] = torch.from_numpy(ids), 1
            labels[i, : len(ids)] = torch.from_numpy(np.where(mask, ids, -100))
        loss = model(tokens.to(model.device), attention_mask=present.to(model.device), labels=labels.to(model.device),
                     num_items_in_batch=learned).loss
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    norm.item()

def bench(shape: parallel.Config | None = None, batch: int = 256, capacity: int = 16384, steps: int = 8) -> dict:
    """Tokens a second of Qwen3-0.6B on one GPU, data and optimizer included, beside a plain loop in transformers. The
    weights and tokens are random, the lengths like those of NuminaMath (a mean of 590), and a quarter is prompt."""
    from transformers import AutoModelForCausalLM
    shape = shape or parallel.Config()
    with tempfile.TemporaryDirectory() as folder:
        model, data, rng = str(Path(folder, "model")), str(Path(folder, "rows.arrow")), np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(6.2, 0.6, batch * steps), 64, min(4096, capacity)).astype(int)
        ids = [rng.integers(0, shape.vocab_size, n, dtype=np.int32) for n in lengths]
        masks = [(np.arange(n) >= n // 4).astype(np.uint8) for n in lengths]
        al.write(al.Table.from_pydict({"input_ids": ids, "loss_mask": masks}), data)
        parallel.Qwen3(shape).save_pretrained(model)
        trainer = Trainer(Config(model, data, max_tokens=capacity, batch=batch, epochs=1))
        ours, device = [trainer.learn(i + 1) for i in range(steps)][steps // 2 :], trainer.mesh.device
        del trainer
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    optimizer, theirs = torch.optim.AdamW(plain.parameters(), 1e-5, (0.9, 0.95), fused=True), []
    for number in range(steps):
        rows, begin = rows_of_step(number, len(ids), batch, 0), time.perf_counter()
        plain_step(plain, optimizer, [(ids[row], masks[row]) for row in rows], capacity)        # ends in a wait
        theirs.append({"tokens": int(lengths[rows].sum()), "seconds": time.perf_counter() - begin})
    mine, other = (sum(x["tokens"] for x in some) / sum(x["seconds"] for x in some)
                   for some in (ours, theirs[steps // 2 :]))
    print(f"sft.py       {mine:>10,.0f} tokens/s, mfu {ours[-1]['mfu'] or 0:.1%}, {ours[-1]['memory_gb']:.1f} GB\n"
          f"plain loop   {other:>10,.0f} tokens/s: {mine / other:.2f} times slower")
    return {"tokens_per_s": mine, "plain": other}

def main() -> None:
    if sys.argv[1:2] == ["prepare"]:
        print(dict(prepare(**asdict(arguments(Prepare, sys.argv[2:])))))
    elif sys.argv[1:] == ["bench"]:
        bench()
    elif len(sys.argv) > 1 or "RANK" in os.environ:
        train(arguments(Config))
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        demo()
        if torch.cuda.is_available():
            bench()

if __name__ == "__main__":
    main()
