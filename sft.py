"""sft: a model learns from a fixed data set.

Two steps. `prepare` turns any data set into one Arrow file of token ids, and marks the tokens that the assistant would
have to write: the only ones that are learned. `train` packs rows of it side by side, without padding, and runs them
over whatever layout of parallel.py there is. With --loss dpo the rows are pairs, and the better of two answers gains.

    jsonl, Arrow, parquet, hub         F.arrow                          one micro-batch
    +---------------------+            +--------------------------+     tokens     u u a a . u a a a . u u u a .
    | problem, solution   |  template  | input_ids   u u a a .    |     positions  0 1 2 3 4 0 1 2 3 4 0 1 2 3 4
    | question, answer    | ---------> | loss_mask   0 0 1 1 1    |     predict      ^ ^ ^   ^ ^ ^ ^       ^ ^
    | messages, prompt .. |  tokenizer | held_out    no           |     cu_seqlens 0 5 10 15: attention ends there
    | chosen, rejected    |            +--------------------------+     (u: user's, a: assistant's, .: end of turn)
    +---------------------+

A step is `batch` rows, whatever the layout: they are spread over the micro-batches of all data-parallel ranks so that
each has about as many tokens, and every sum is divided by the step's own count of learned tokens. The order of the
rows is a function of (seed, epoch), the learning rate one of the step. So, beside weights and optimizer, a checkpoint
holds no more than the number of its step, and a run that was killed goes on bit by bit.

Public names: prepare, Chat; rows_of_step, Examples; sft_loss, dpo_loss; train. ppo.py needs, too: claim, cosine, Log.

    python sft.py                                                              the demo
    python sft.py prepare --data NotASI/NuminaMath-CoT-Small-Hard-200k --model M --out F.arrow
    python sft.py --model M --data F.arrow --out DIR                           one GPU
    torchrun --nproc-per-node 8 sft.py --model M --data F.arrow --out DIR      eight
"""
import itertools, json, math, os, random, re, shutil, sys, tempfile, time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

import arrowlite as al
import parallel
from engine import end_of_turn
from evaluate import chat_messages, read_rows
from parallel import arguments, pack

# --- settings: the defaults are those of the full pipeline -----------------------------------------------------------

@dataclass
class Prepare:
    """181k problems of NuminaMath, of which 1k are held out."""
    data: str = "NotASI/NuminaMath-CoT-Small-Hard-200k"     # jsonl, Arrow, parquet, a directory of them, or a hub id
    model: str = "Qwen/Qwen3-0.6B-Base"     # whose tokenizer and chat template are used
    out: str = "sft.arrow"                  # the file to write
    held_out: float = 1 / 180               # share of the prompts that validate and are never learned
    max_tokens: int = 8192                  # a row of more is skipped
    split: str = "train"                    # of a data set from the hub

@dataclass
class Config:
    """Qwen3-0.6B on NuminaMath: 2109 steps on eight GPUs."""
    model: str = "Qwen/Qwen3-0.6B-Base"     # a model directory or a hub id
    data: str = "sft.arrow"                 # what `prepare` wrote
    out: str = "sft"                        # the directory of the run
    # what is learned
    loss: Literal["sft", "dpo"] = "sft"     # dpo: from pairs of a chosen and a rejected answer
    beta: float = 0.1                       # dpo: how dear it is to leave the reference
    epochs: int = 3                         # times that each row is learned from
    steps: int | None = None                # end after so many steps, instead of after `epochs`
    batch: int = 256                        # rows (or pairs) a step, over all GPUs
    # how
    max_tokens: int = 8192                  # of a micro-batch
    lr: float = 5e-5                        # the highest
    min_lr: float = 5e-6                    # at the end of the cosine
    warmup: float = 0.1                     # share of the steps in which the learning rate rises
    beta1: float = 0.9                      # AdamW's: how long it remembers gradients
    beta2: float = 0.95                     # AdamW's: how long it remembers their squares
    weight_decay: float = 1e-3              # of matrices; norms are not decayed
    clip: float = 1.0                       # the largest gradient norm that a step is made with
    seed: int = 0                           # of the order of the rows
    # where
    dp: int | None = None                   # copies of the model; by default as many as there are GPUs for
    pp: int = 1                             # pipeline stages
    tp: int = 1                             # parts of each layer
    recompute: bool = False                 # activations a second time in the backward pass, instead of keeping them
    device: Literal["cuda", "cpu"] | None = None                         # otherwise a GPU if there is one
    dtype: Literal["bfloat16", "float32", "float64"] | None = None       # otherwise what suits the device
    # what remains
    log_every: int = 1                      # steps from one printed line to the next; metrics.jsonl has them all
    eval_every: int = 100                   # steps from one validation to the next
    save_every: int = 100                   # steps from one checkpoint to the next
    keep: int = 2                           # checkpoints that are kept; 0: all
    resume: bool = False                    # go on with the run in `out`, if there is one
    wandb: str | None = None                # a Weights & Biases project to report to

# --- rows: from the shapes that data sets have to conversations ------------------------------------------------------

SHAPES = (("problem", "solution"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response"))

def turns(text, role):
    if isinstance(text, list):              # of messages already
        return text
    return [{"role": role, "content": text}]

def conversation(row, asked, said):
    question = row.get(asked)
    answer = row[said]
    if said == "answer" and "\n####" in answer:
        # GSM8K: the working, with notes for a calculator, <<48/2=24>>, and in the last line "#### 72"
        working, _, final = answer.rpartition("\n####")
        working = re.sub("<<.*?>>", "", working)
        answer = f"{working}\nThe answer is \\boxed{{{final.strip()}}}."
        asked = "problem"                   # for the next line
    if asked == "problem":                  # in the words in which evaluate.py and ppo.py ask
        question = chat_messages(question)
    answer = turns(answer, "assistant")
    if answer[0]["role"] != "assistant":    # of a pair: the whole conversation
        return answer
    return turns(question, "user") + answer

def conversations(row):
    """One, or of a pair two: the chosen and the rejected one."""
    present = {name for name, value in row.items() if value}
    if present >= {"chosen", "rejected"}:
        asked = next((asked for asked, _ in SHAPES if asked in present), "prompt")
        chosen = conversation(row, asked, "chosen")
        rejected = conversation(row, asked, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected answer different prompts")
        return [chosen, rejected]
    for asked, said in SHAPES:              # before messages: NuminaMath's do not ask for a box
        if present >= {asked, said}:
            return [conversation(row, asked, said)]
    if "messages" in present:
        return [row["messages"]]
    raise ValueError("no answer: it has no messages, prompt and completion, problem and solution, question and answer, "
                     "or prompt, chosen and rejected")

def is_held_out(messages, share):
    """By the words of its first question: with two solutions it is on one side, and in every data set on the same."""
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    return random.Random(" ".join(question.lower().split())).random() < share

# --- the chat template: which tokens are the assistant's -------------------------------------------------------------

class Chat:
    r"""A tokenizer's chat template, and which of the tokens that it makes of a conversation are the assistant's.

    Those are what it has to write after the prompt of a generation (thinking off), up to the mark that ends its turn:
        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n
                                                                                     ^^^^^^^^^^^^^^^
    The text is cut there and the pieces are tokenized one by one, so no token lies on a border: as when generating."""

    def __init__(self, tokenizer):
        end = end_of_turn(tokenizer)
        if end is None:
            raise ValueError("no chat template that ends the assistant's turn with one token; take another model")
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_ids_to_tokens(end)         # <|im_end|>: not always tokenizer.eos_token
        self.render = partial(tokenizer.apply_chat_template, tokenize=False)

    def pieces(self, messages):
        """The text of a conversation, cut where the assistant begins and ends: every second piece is the assistant's.
        The borders are found in the whole text, as templates render the last turn differently."""
        turns = []
        for message in messages:
            text = message["content"]
            if message["role"] == "assistant":
                text = text.strip()
            if not text or any(token in text for token in self.tokenizer.all_special_tokens):
                raise ValueError("a turn is empty, or has a special token in it, which may end a turn")
            turns.append(message | {"content": text})
        if turns[-1]["role"] != "assistant":
            raise ValueError("no answer: the last turn is not the assistant's")
        whole = self.render(turns)
        whole.encode()          # raises for this row alone, as the tokenizer would for all: half of a surrogate pair
        cuts = [0]
        for k, turn in enumerate(turns):
            if turn["role"] == "assistant":
                head = self.render(turns[:k], add_generation_prompt=True, enable_thinking=False)
                if not whole.startswith(head):                  # Qwen3 writes earlier turns without empty thoughts
                    head = self.render(turns[:k], add_generation_prompt=True)
                if not whole.startswith(head):
                    raise ValueError("the chat template writes a turn differently than the prompt to generate it")
                cuts += [len(head), whole.index(self.end, len(head)) + len(self.end)]
        return [whole[start:end] for start, end in itertools.pairwise([*cuts, len(whole)])]

    def encode(self, documents):
        """(token ids, mask) of pieces, one by one; the tokenizer spreads a thousand at a time over the CPU's cores."""
        for start in range(0, len(documents), 1000):
            some = documents[start : start + 1000]
            encode = self.tokenizer.backend_tokenizer.encode_batch_fast
            encodings = iter(encode(sum(some, []), add_special_tokens=False))
            for pieces in some:
                parts = [next(encodings).ids for _ in pieces]
                learned = np.arange(len(parts), dtype=np.uint8) % 2
                yield np.array(sum(parts, []), np.int32), learned.repeat([len(part) for part in parts])

def marked(pieces):
    """As the model will see it; what is learned stands in [[ ]]."""
    forms = itertools.cycle(["{}", "[[{}]]"])
    return "".join(form.format(text) for form, text in zip(forms, pieces))

# --- prepare: a data set becomes an Arrow file -----------------------------------------------------------------------

SIDES = {1: ("",), 2: ("chosen_", "rejected_")}     # of a row's documents: what the names of their columns begin with

def prepare(data, model, out, held_out=1 / 180, max_tokens=8192, split="train"):
    """Write the Arrow file that `train` takes: input_ids list<int32>, loss_mask list<uint8>, held_out bool; of pairs,
    chosen_input_ids, rejected_input_ids and so on. `model` is a tokenizer or where to find one. Rows that cannot be
    used are counted by their reason; a data set of which half are so is refused."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not hasattr(model, "chat_template"):
        model = AutoTokenizer.from_pretrained(parallel.local_folder(model))
    chat = Chat(model)
    usable = []                             # (where it stands, is it held out, its documents as pieces)
    skipped = defaultdict(list)             # {why: [where, ...]}
    for where, row in tqdm(read_rows(data, split), "rows", disable=None):
        try:
            talks = conversations(row)
            usable.append((where, is_held_out(talks[0], held_out), [chat.pieces(talk) for talk in talks]))
        except Exception as error:          # a row can be wrong in more ways than there are names for
            skipped[str(error)].append(where)
    encoded = chat.encode([pieces for _, _, documents in usable for pieces in documents])
    columns = defaultdict(list)
    for where, held, documents in usable:
        row = [next(encoded) for _ in documents]
        if sum(len(ids) for ids, _ in row) > max_tokens:
            skipped[f"too long: more than --max_tokens {max_tokens}"].append(where)
            continue
        if not columns:
            print(f"{where} as the model will see it; what is learned stands in [[ ]]:",
                  *map(marked, documents), sep="\n")
        columns["held_out"].append(held)
        for side, (ids, mask) in zip(SIDES[len(row)], row):
            columns[side + "input_ids"].append(ids)
            columns[side + "loss_mask"].append(mask)
    for why, places in skipped.items():
        print(f"skipped {len(places):,} rows, the first {places[0]}: {why}")
    rows = len(columns["held_out"])
    lost = sum(map(len, skipped.values()))
    if rows <= lost:
        raise ValueError(f"{rows:,} rows of {data} can be used and {lost:,} cannot: {'; '.join(skipped)}")
    al.write(al.Table.from_pydict(columns), out)
    return {"rows": rows, "held_out": sum(columns["held_out"]), "skipped": lost}

# --- batches: rows of the file to packed tokens ----------------------------------------------------------------------

def rows_of_step(step, rows, batch, seed):
    """Which of the `rows` rows step `step` (from 0 on) learns from. Each epoch has an order of its own, and leaves out
    the few rows at its end that do not fill a step."""
    epoch, at = divmod(step, rows // batch)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[at * batch : (at + 1) * batch]

class Examples:
    """The rows of a prepared file. Each is one document or, of a pair, two: the chosen one and the rejected one."""

    def __init__(self, path, pairs=False):
        table = al.read(path)
        sides = SIDES[1 + pairs]
        if sides[0] + "input_ids" not in table.column_names:
            raise ValueError(f"{path} has no {sides[0]}input_ids; make it with: python sft.py prepare --out {path}")
        columns = [table[side + name] for side in sides for name in ("input_ids", "loss_mask")]
        parts = [np.split(column.flatten().to_numpy(), column.lengths().cumsum()[:-1]) for column in columns]
        self.rows = list(zip(*parts))       # (ids, mask), or (ids of the chosen, mask, ids of the rejected, mask)
        self.lengths = np.stack([column.lengths() for column in columns[0::2]], 1)      # [rows, 1 or 2] tokens
        # So many are learned; never a document's first, which nothing precedes.
        self.counts = np.array([[mask[1:].sum() for mask in row[1::2]] for row in self.rows], int)
        self.reference = torch.zeros(self.lengths.shape)                                # dpo: logprobs
        held_out = table["held_out"].to_numpy()
        self.held_out = np.flatnonzero(held_out)                                        # rows, by their numbers
        self.learned = np.flatnonzero(held_out == 0)                                    # those of the others

    def micro_batches(self, rows, max_tokens, mesh):
        """This dp rank's part of these rows, packed; of pairs: chosen, rejected, ... (count, pairs: of all ranks.)"""
        bins = pack(self.lengths[rows].sum(1), max_tokens, mesh.dp)
        batches = []
        for some in filter(None, bins[mesh.dp_rank :: mesh.dp]):
            mine = rows[some]
            parts = sum([self.rows[row] for row in mine], ())
            batches.append(parallel.micro_batch(parts[0::2], parts[1::2]) | {
                "rows": mine, "count": int(self.counts[rows].sum()), "pairs": len(rows),
                "answers": torch.from_numpy(self.counts[mine].flatten()), "reference": self.reference[mine]})
        return batches

# --- losses: sums over a micro-batch, divided by the count of the whole step -----------------------------------------

def logprobs(model, hidden, batch):
    """Of the learned tokens, [learned]."""
    return model.logprobs(hidden.index_select(0, batch["predict"]), batch["targets"])[0]

def sft_loss(model, hidden, batch):
    """The mean of -log p(token) over all learned tokens of the step, however it is cut into micro-batches."""
    loss = -logprobs(model, hidden, batch).sum() / batch["count"]
    return loss, {"loss": loss}

def answer_logprobs(model, hidden, batch):
    """Sums over each answer, [pairs, 2], without atomics; unsafe: without a check that waits for the GPU."""
    return torch.segment_reduce(
        logprobs(model, hidden, batch), "sum", lengths=batch["answers"], unsafe=True).view(-1, 2)

def dpo_loss(model, hidden, batch, beta=0.1):
    """DPO (arXiv 2305.18290, eq. 7). The reward of an answer is how much likelier it is than under the reference, and
    the loss is -log of the probability that the chosen one is the better one."""
    rewards = beta * (answer_logprobs(model, hidden, batch) - batch["reference"])       # [pairs, 2]
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -torch.nn.functional.logsigmoid(margin)
    each = {"loss": losses, "accuracy": margin > 0, "margin": margin, "reward": rewards[:, 0]}
    means = {name: x.double().sum() / batch["pairs"] for name, x in each.items()}
    return means["loss"], means

# --- what any run needs: its directory, its schedule, its numbers ----------------------------------------------------

def at_least_one(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} should be at least 1")

def claim(config):
    """Make `config.out` the directory of this run. One that holds a run already is only taken to go on with it."""
    settings = asdict(config)
    path = Path(config.out, "config.json")
    if path.exists():
        if re.findall(r'^  "(\w+)":', path.read_text(), re.MULTILINE) != list(settings):    # a model's, ppo.py's
            raise ValueError(f"{path} is not of a run like this one; choose another --out")
        if not config.resume:
            raise ValueError(f"{config.out} holds a run; go on with it by --resume, or choose another --out")
    if dist.is_initialized():
        dist.barrier()                      # all have looked before one writes, and all write the same
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2))

def cosine(step, steps, warmup, lr, min_lr):
    """The learning rate of a step, from 0 on: a line up for the share `warmup` of all steps, then a cosine down."""
    rise = round(warmup * steps)
    if step < rise:
        return lr * (step + 1) / rise
    share = (step - rise) / max(1, steps - 1 - rise)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2

class Log:
    """What a run says of itself, by rank 0 alone: a bar, a line a step, metrics.jsonl, curves.png, and wandb if asked.
    A run that goes on after step `start` (they are counted from 1) forgets what was said of later ones."""

    def __init__(self, config, steps, start=0):
        self.config = config
        self.path = Path(config.out, "metrics.jsonl")
        self.silent = dist.is_initialized() and dist.get_rank() > 0
        self.bar = tqdm(total=steps, initial=start, disable=self.silent or None)   # None: no terminal
        if self.silent:
            return
        self.path.touch()
        lines = re.findall(r'({"step": (\d+).*}\n)', self.path.read_text())             # a kill may cut the last one
        self.path.write_text("".join(line for line, step in lines if int(step) <= start))
        if config.wandb:
            import wandb
            self.wandb = wandb.init(project=config.wandb, name=config.out, config=asdict(config))

    def log(self, step, **values):
        """`step` steps are done."""
        if self.silent:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if step % self.config.log_every == 0 or step == self.bar.total:
            words = [f"{name} {value:.6g}" for name, value in values.items()]
            self.bar.write(f"step {step}/{self.bar.total} | {' | '.join(words)}")
        self.bar.update(step - self.bar.n)
        if self.config.wandb:
            self.wandb.log(values, step=step)

    def close(self):
        self.bar.close()
        if not self.silent:
            curves(self.config.out)

def curves(out):
    """curves.png: each number of metrics.jsonl over the steps."""
    from matplotlib.figure import Figure
    columns = al.Table.from_jsonl(f"{out}/metrics.jsonl").to_pydict()
    steps = columns.pop("step")
    figure = Figure(figsize=(8, 2 * len(columns)), layout="constrained")
    for name, axis in zip(columns, figure.subplots(len(columns))):
        axis.plot(steps, columns[name], ".-")
        axis.set_title(name)
    figure.savefig(f"{out}/curves.png")

# --- training --------------------------------------------------------------------------------------------------------

NAMES = {"sft": ["loss"], "dpo": ["loss", "accuracy", "margin", "reward"]}      # what a loss tells

def check(config, examples, shape):
    """Before the directory of the run is taken: what else would be taken in silence, or be found late."""
    at_least_one(config, "epochs", "batch", "log_every", "eval_every", "save_every")
    if not 0 <= config.min_lr <= config.lr or not 0 <= config.warmup <= 1:
        raise ValueError("--min_lr should be from 0 to --lr, and --warmup from 0 to 1")
    if not examples.learned.size:
        raise ValueError(f"{config.data} has no rows to learn from; prepare it with a smaller --held_out")
    if max(part.max() for row in examples.rows for part in row) >= shape.vocab_size:
        raise ValueError(f"{config.data} has tokens that {config.model} has not; prepare it with that --model")
    pack([examples.lengths.sum(1).max()], config.max_tokens)    # raises if the longest row fits no micro-batch, ...
    pack([examples.lengths.max()], shape.max_position_embeddings)       # ... or has more tokens than the model knows

def total(x, mesh):
    """The sum over all ranks; those of a tp group have the same, which counts once."""
    if mesh.size > 1:
        dist.all_reduce(x)
    return x / mesh.tp

def means(config, model, batches, backward=True):
    """What the loss tells of a step; on the device, so that nobody waits for it."""
    loss = partial(dpo_loss, beta=config.beta) if config.loss == "dpo" else sft_loss
    names = NAMES[config.loss]
    sums = torch.zeros(len(names), dtype=torch.float64, device=model.mesh.device)
    for found in parallel.run(model, batches, loss, backward=backward):         # of other stages than the last: none
        sums += torch.stack(list(found.values())).detach()
    return dict(zip(names, total(sums, model.mesh)))

def reference(config, model, examples):
    """What the model says of every answer before it learns, [rows, 2]: DPO's frozen reference, kept in memory."""
    answers = torch.zeros(examples.lengths.shape, dtype=torch.float64, device=model.mesh.device)

    def score(model, hidden, batch):
        answers[batch["rows"]] = answer_logprobs(model, hidden, batch).double()
        return None, None

    batches = examples.micro_batches(np.arange(len(answers)), config.max_tokens, model.mesh)
    for batch in tqdm(batches, "reference", disable=model.mesh.rank > 0 or None):
        parallel.run(model, [batch], score, backward=False)
    return total(answers, model.mesh).cpu()

def train(config):
    """A whole run. Returns the numbers of its last step, on every rank."""
    mesh = parallel.init(config.dp, config.pp, config.tp, config.device)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)            # more of them wait for each other while another process has their core
    examples = Examples(config.data, config.loss == "dpo")
    model = parallel.Qwen3.from_pretrained(
        config.model, mesh, dtype=config.dtype and getattr(torch, config.dtype), recompute=config.recompute)
    optimizer = parallel.AdamW(model, config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay,
                               clip=config.clip)
    check(config, examples, model.config)
    claim(config)
    if config.loss == "dpo":
        examples.reference = reference(config, model, examples)
    done = 0
    if config.resume and parallel.latest(config.out):
        done = parallel.load(config.out, model, optimizer)["step"]
    values = learn(config, model, optimizer, examples, done)
    folder = f"{config.out}/model"
    model.save_pretrained(folder)
    if mesh.rank == 0:                      # to generate until the end of the turn: a base model knows that of texts
        tokenizer = AutoTokenizer.from_pretrained(folder)
        GenerationConfig(eos_token_id=end_of_turn(tokenizer)).save_pretrained(folder)
    return values

def learn(config, model, optimizer, examples, done):
    """The steps that are left."""
    mesh = model.mesh
    learned = examples.learned
    batch = min(config.batch, len(learned))
    steps = config.steps or config.epochs * (len(learned) // batch)

    def prepared(step):
        rows = learned[rows_of_step(step, len(learned), batch, config.seed)]
        return examples.lengths[rows].flatten().tolist(), examples.micro_batches(rows, config.max_tokens, mesh)

    log = Log(config, steps, done)
    values = {}
    ahead = prepared(done)
    for step in range(done + 1, steps + 1):
        begin = time.perf_counter()
        lengths, batches = ahead
        told = means(config, model, batches)
        lr = cosine(step - 1, steps, config.warmup, config.lr, config.min_lr)
        norm = optimizer.step(lr)
        ahead = prepared(step)              # the next step's, while the GPU is at work
        values = {name: x.item() for name, x in told.items()} | {"grad_norm": norm.item(), "lr": lr}
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise FloatingPointError(f"step {step}: the loss is {values['loss']:.4g} and the gradient's norm "
                                     f"{norm:.4g}; the last checkpoint is {parallel.latest(config.out)}")
        seconds = time.perf_counter() - begin
        values |= {"tokens": sum(lengths), "tokens_per_s": sum(lengths) / seconds, "seconds": seconds}
        if mesh.device.type == "cuda":      # a share of what an H100 or H200 can do in bf16, by its data sheet
            values["mfu"] = parallel.training_flops(model.config, lengths) / seconds / 989e12 / mesh.size
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if examples.held_out.size and (step % config.eval_every == 0 or step == steps):
            batches = examples.micro_batches(examples.held_out, config.max_tokens, mesh)
            told = means(config, model, batches, backward=False)
            values |= {f"val_{name}": x.item() for name, x in told.items()}
        log.log(step, **values)
        if step % config.save_every == 0 or step == steps:
            parallel.save(f"{config.out}/step-{step:06d}", model, optimizer, {"step": step})
            for old in sorted(Path(config.out).glob("step-*"))[: -config.keep]:
                shutil.rmtree(old, ignore_errors=True)          # by all ranks
    log.close()
    return values

# --- the demo --------------------------------------------------------------------------------------------------------

def demo():
    """A random model of 0.1M parameters learns to add three numbers, and is asked for sums that it has not seen."""
    from evaluate import arithmetic, evaluate
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        al.write(al.Table.from_pylist(arithmetic(3000)), "sums")
        parallel.tiny_model("tiny", hidden_size=64, num_hidden_layers=2)
        prepare("sums", "tiny", "sft.arrow", held_out=0.05)
        train(Config("tiny", epochs=2, batch=16, lr=3e-3, min_lr=3e-4, log_every=30))
        score, error = evaluate("sft/model", arithmetic(200, seed=1, held_out=True), max_tokens=64)[1]["pass@1"]
    print(f"{score:.1%} (+- {error:.1%}) of unseen sums are right")
    assert score > 0.4

def main():
    if sys.argv[1:2] == ["prepare"]:
        print(prepare(**asdict(arguments(Prepare, sys.argv[2:]))))
    elif len(sys.argv) > 1 or "RANK" in os.environ:
        train(arguments(Config))
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        demo()

if __name__ == "__main__":
    with parallel.mistakes():
        main()
