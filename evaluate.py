"""evaluate: answers, grades, scores.

A model answers math problems, each answer is graded against the gold one, and the grades become scores with their
errors. Generation and grading run at the same time, in processes of their own:

    problems --> Generator 0 (one engine a GPU) --> text --> boxes --> the same spelling or number? --> right, wrong
             --> Generator 1 ...                               |                                           ^
                                                               +--> Grader 0, 1, ... (math-verify) --------+
                                                                    overruns its deadline: killed, and replaced
Public names
    grade(answer, gold)                     1.0 or 0.0; Graders(workers, deadline) is the pool behind it
    extract(text), boxes(text)              the last balanced \\boxed{}; all of them
    load_problems(data), arithmetic(n, seed), worth_learning(problems, ...), chat_messages(problem)
    evaluate(model, problems, ...)          (Table of samples, summary); summarize, compare for samples of any origin

    python evaluate.py                                                  the demo, in under a minute
    python evaluate.py --model Qwen/Qwen3-0.6B --data math500 --n 8     pass@1, mean@8, pass@8, maj@8, on every GPU
    python evaluate.py --model runs/sft runs/ppo --data test.jsonl      two models, and their paired difference
    python evaluate.py show evaluation/runs_ppo.arrow --verdict wrong   reads samples as a person would
    python evaluate.py arithmetic --n 1000 --seed 0 --out sums.jsonl    the task that the demos learn (--held_out: test)
    python evaluate.py problems --data HUB/ID --model M --out F.jsonl   those worth learning from: not guessed, not long
"""
import argparse, asyncio, collections, contextlib, dataclasses, fcntl, functools, hashlib, itertools, json, logging
import math, os, random, re, resource, signal, sys, tempfile, textwrap, time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import actors
import arrowlite as al

@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["Qwen/Qwen3-0.6B"])   # directories or hub ids, compared in order
    data: str = "math500"           # math500, gsm8k, a .jsonl or Arrow file, or a hub id
    limit: int = 0                  # only the first so many problems; 0: all
    n: int = 1                      # samples of each problem
    temperature: float = 0.6        # 0 is greedy
    top_p: float = 0.95             # the fewest tokens that hold this much of the probability
    top_k: int = -1                 # the most probable tokens; -1: all
    max_tokens: int = 3072          # of an answer; one that is cut off here counts as truncated
    seed: int = 0                   # the same seed gives the same samples
    graders: int = 0                # processes that grade; 0: one a CPU core
    deadline: float = 5.0           # seconds for one answer, then its grader is killed and its score is 0
    device: str | None = None       # cpu; otherwise every GPU there is
    memory: float = 0.9             # share of a GPU's memory that an engine takes
    dtype: str | None = None        # bfloat16, float32; otherwise what suits the device
    out: str = "evaluation"         # a directory: samples, scores.json, scores.png
    resume: bool = False            # keep the samples that --out has already, of models and problems as they are

# --- answers: what stands in the box, and when two spellings are surely the same -------------------------------------

_MARKS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)       # an escaped brace is text, and does not count

def boxes(text: str) -> list[str]:
    """What stands in every balanced \\boxed{} outside of thinking, in order. One that is never closed holds no answer,
    nor does an empty one (the instruction, repeated); of nested ones the inner counts."""
    text, opened, found = text.rpartition("</think>")[2].partition("<think>")[0], [], []
    for mark in _MARKS.finditer(text):
        if mark[0][0] == "\\" and len(mark[0]) == 2:
            continue
        if mark[0] != "}":
            opened.append((len(mark[0]) > 1, mark.end()))
        elif opened:
            box, start = opened.pop()
            if box and not (found and found[-1][0] > start):
                found.append((start, text[start:mark.start()].strip()))
    return [answer for _, answer in found if answer]

def extract(text: str) -> str | None:
    """The answer: what stands in the last balanced \\boxed{}."""
    return (boxes(text) or [None])[-1]

_GROUPED = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\}|\\[,!: ]|,\\!)\d{3})+(?:\.\d*)?")                      # 1,234,567
_NUMBER = re.compile(r"([+-]?)(?:\\frac\{(\d{1,40})\}\{(\d{1,40})\}|\\frac(\d)(\d)|(\d{1,40})/(\d{1,40})"
                     r"|(\d{1,40}(?:\.\d{0,40})?|\.\d{1,40}))")

GUESSES = {"yes", "no", "true", "false"}

def tidy(answer: str) -> str:
    """Without what math-verify cannot read: a full stop, another sign for the empty set."""
    return re.sub(r"(?<!\\right)\.$", "", answer.strip()).replace("\\varnothing", "\\emptyset")

def plain(answer: str) -> str:
    """One spelling of answers that differ in typesetting alone."""
    answer = tidy(re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\?\$", "", tidy(answer)))
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    answer = re.sub(r"^\\text\{([a-zA-Z]+)\}$", r"\1", answer)
    answer = answer.lower() if answer.lower() in GUESSES else answer
    if _GROUPED.fullmatch(answer):
        return re.sub(r"[^\d.+-]", "", answer)
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(answer.split()))          # not between digits: 1 2 is not 12

def number(answer: str) -> Fraction | None:
    """The exact value, if it is a plain integer, decimal or fraction."""
    if not (match := _NUMBER.fullmatch(plain(answer))):
        return None
    sign, *parts = [part for part in match.groups() if part is not None]
    if len(parts) == 2 and not int(parts[1]):
        return None
    return Fraction(sign + "1") * Fraction("/".join(parts))

def quick(answer: str, gold: str) -> bool | None:
    """The verdict where it takes no sympy to know it: on equal spellings, words, and two plain numbers. None where it
    does, also if numbers differ by less than 1e-5: math-verify rounds, and 0.333333 is 1/3 to it."""
    spelled = plain(answer), plain(gold)
    if spelled[0] == spelled[1]:
        return True
    if all(map(str.isalpha, spelled)) and (GUESSES & {*spelled} or all(len(x) > 2 and x.isupper() for x in spelled)):
        return False                                    # to math-verify CAB is ABC, and ON is NO: products of letters
    a, b = number(answer), number(gold)
    if a is None or b is None:
        return None
    return True if a == b else False if abs(a - b) > 1e-5 else None

# --- grading: math-verify, in processes that are made to be killed ---------------------------------------------------

class Grade(NamedTuple):
    score: float            # 1.0 or 0.0
    verdict: str            # right, wrong, unparsed (no box), timeout, crashed
    answer: str | None      # what was graded

class Grader:
    """The process in which sympy runs. Some answers make it hang (9^{9^{9^9}}), crash, or ask for all the memory."""

    def __init__(self, memory: int = 2 << 30):
        """memory: bytes that answers may ask for, before they are a MemoryError and wrong; 0: all there is."""
        if memory:
            memory += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        from math_verify import parse, verify           # here alone: nobody else needs sympy
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        # Their own timeouts are signals, which sympy may swallow; ours is a kill. Samples of a problem share its gold.
        self.verify = functools.partial(verify, timeout_seconds=None)
        self.parse = functools.lru_cache(1000)(lambda x: parse(f"\\boxed{{{tidy(x)}}}", parsing_timeout=None))
        self.parse("1")                                 # the first one loads the grammar

    def equal(self, answers: list[str], gold: str) -> bool:
        return all(self.verify(self.parse(gold), self.parse(answer)) for answer in answers)

class Graders:
    """A pool of Grader processes. Rows are handed out one by one (0.3 ms, where sympy takes 5), so that a row that
    hangs costs its own deadline and nothing else. `ray` is the module to run on: actors, or the real Ray.

    As an actor it grades beside whatever its owner does: ray.remote(Graders).remote(8).agrade.remote(pairs)
    """
    LONGEST, MOST = 2000, 3     # characters of an answer, and answers of a text, that sympy is asked about

    def __init__(self, workers: int = 0, deadline: float = 5.0, ray=actors):
        self.deadline, self.ray = deadline, ray
        if not ray.is_initialized():
            ray.init()
        self.idle = asyncio.LifoQueue()                 # the one that was used last is the warmest
        for _ in range(workers if workers > 0 else len(os.sched_getaffinity(0))):
            self.idle.put_nowait(None)                  # a place, not filled until it is needed

    def grade(self, pairs: list[tuple[str, str]]) -> list[Grade]:
        """The grades of (text, gold) pairs, in their order."""
        places, self.idle = self.idle, asyncio.LifoQueue()          # a queue is of one event loop, and this starts one
        while not places.empty():
            self.idle.put_nowait(places.get_nowait())
        return asyncio.run(self.agrade(pairs))

    async def agrade(self, pairs: list[tuple[str, str]]) -> list[Grade]:
        """The same where an event loop runs already."""
        return await asyncio.gather(*[self._grade(text, gold) for text, gold in pairs])

    async def _grade(self, text: str, gold: str) -> Grade:
        """Of several boxes all have to be right: who offers two different answers has none."""
        found, gold = list(dict.fromkeys(boxes(str(text)))), str(gold)
        if not found:
            return Grade(0.0, "unparsed", None)
        known = [quick(answer, gold) for answer in found]
        unsure = [answer for answer, right in zip(found, known) if right is None]
        if False in known or len(unsure) > self.MOST or any(len(answer) > self.LONGEST for answer in unsure):
            verdict = "wrong"
        else:
            verdict = await self._compare(unsure, gold) if unsure else "right"
        return Grade(float(verdict == "right"), verdict, found[-1])

    async def _compare(self, answers: list[str], gold: str, tries: int = 2) -> str:
        worker, verdict = await self.idle.get(), None
        try:
            worker = worker or await self._hire()
            verdict = await self._ask(worker, answers, gold)
        finally:
            self.idle.put_nowait(worker if verdict in ("right", "wrong") else None)
        return await self._compare(answers, gold, tries - 1) if verdict == "crashed" and tries > 1 else verdict

    async def _ask(self, worker, answers: list[str], gold: str) -> str:
        try:
            right = await asyncio.wait_for(worker.equal.remote(answers, gold), self.deadline)
            return "right" if right else "wrong"
        except asyncio.TimeoutError:
            self.ray.kill(worker)
            return "timeout"
        except self.ray.exceptions.RayError:            # by this answer, or killed by somebody else: tried again
            return "crashed"

    async def _hire(self):
        worker = self.ray.remote(Grader).remote()
        await worker.equal.remote([], "")               # ready; the clock of its first answer starts afterwards
        return worker

_graders = None

def grade(answer: str, gold: str | int) -> float:
    """1.0 if the text's boxed answer is the gold one, else 0.0."""
    global _graders
    if _graders is None or not actors.is_initialized():
        _graders = Graders(workers=1)
    return _graders.grade([(answer, gold)])[0].score

# --- problems: rows of {"problem", "answer"}, whatever their columns were called -------------------------------------

INSTRUCTION = "Work step by step and put the final answer inside \\boxed{}."
HUB = {"math500": ("HuggingFaceH4/MATH-500", None), "gsm8k": ("openai/gsm8k", "main")}

def chat_messages(problem: str) -> list[dict]:
    return [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]

def read(path: str) -> al.Table:
    return al.Table.from_jsonl(path) if path.endswith((".jsonl", ".json")) else al.read(path)

def _lines(path: str):
    """(line, row) one by one: as a table, a column could not hold 5 and then x+1."""
    with open(path, "rb") as lines:
        for i, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield i, dict(json.loads(line))
                except (ValueError, TypeError, RecursionError) as error:
                    raise ValueError(f"{path}, line {i}: not a JSON object: {error}") from None

def load_problems(data: str, split: str = "test", columns: bool = False) -> list[dict]:
    """math500, gsm8k, or another data set of the hub; a file of that name comes first. With their own `columns`, for
    who grades by those, they need no answer."""
    lines = data.endswith((".jsonl", ".json"))
    if Path(data).is_file():
        rows = _lines(data) if lines else enumerate(al.read(data))
    elif data in HUB or re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith((".jsonl", ".json", ".arrow")):
        import datasets                                 # here alone: files need no network
        rows = enumerate(datasets.load_dataset(*HUB.get(data, (data, None)), split=split))
    else:
        raise FileNotFoundError(f"there is no file {data}; pass math500, gsm8k, a .jsonl or Arrow file, or a hub id")
    problems = [_problem(row, f"{data}, {'line' if lines else 'row'} {i}", columns) for i, row in rows]
    if not problems:
        raise ValueError(f"{data} has no rows")
    return problems

def _problem(row: dict, where: str, columns: bool) -> dict:
    """The shapes of MATH-500, MATH, GSM8K, DeepMath, {"prompt", "answer"}: which column is what, and where in it."""
    def first(*names) -> str:
        values = (row.get(name) for name in names)
        return next((str(x).strip() for x in values if isinstance(x, (str, int, float)) and x != ""), "")

    problem, answer = first("problem", "question", "prompt"), first("final_answer", "answer")
    answer = answer.rpartition("####")[2].strip() or answer                     # GSM8K: the working, then #### 18
    answer = extract(answer or first("solution")) or answer                     # MATH: the solution ends in a box
    if not problem or not (answer or columns):
        raise ValueError(f"{where}: no {'answer' if problem else 'problem'} in its columns {', '.join(row)}; name the "
                         "one problem, question or prompt, the other final_answer, answer or (boxed) solution")
    level = re.sub(r"(?i)^level\s+", "", first("level", "difficulty"))
    found = {"problem": problem, "answer": answer, "subject": first("subject", "type"), "level": level}
    return found | {"columns": row} if columns else found

def chat_prompts(problems: list[dict], tokenizer) -> tuple[list[str], list[list[int]]]:
    """What a model is given for each problem: as text, and as tokens."""
    texts = [tokenizer.apply_chat_template(chat_messages(x["problem"]), tokenize=False, add_generation_prompt=True,
                                           enable_thinking=False) for x in problems]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]

def worth_learning(problems: list[dict], tokenizer, longest: int) -> list[dict]:
    """Without those whose answer is soon guessed (a reward for a guess teaches guessing), and those of which the prompt
    has more than `longest` tokens."""
    lengths = [len(ids) for ids in chat_prompts(problems, tokenizer)[1]]
    return [x for x, n in zip(problems, lengths) if n <= longest and x["answer"].lower().strip(".") not in GUESSES]

def arithmetic(n: int, seed: int = 0, held_out: bool = False, boxed: float = 1.0) -> list[dict]:
    """The demos' task, which a model of 0.1M parameters learns in minutes: sums in two steps. A fifth of all problems,
    picked by hash, is drawn only if held_out: no row of a training set is ever one of a test set. Of the solutions, a
    share of `boxed` puts the answer into a box; the others say it in words, and so teach an answer of no use."""
    if n < 1 or not 0 <= boxed <= 1:
        raise ValueError(f"{n = }, {boxed = }: take at least one problem, and of the solutions a share from 0 to 1")
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        problem = f"{a}+{b}+{c}=?"
        if (random.Random(problem).random() < 0.2) == held_out:
            total, in_box = a + b + c, int(boxed * (len(rows) + 1)) > int(boxed * len(rows))        # evenly spread
            end = f"\\boxed{{{total}}}" if in_box else f"so {total}"
            rows.append({"problem": problem, "answer": str(total),
                         "solution": f"{a}+{b}={a + b}, {a + b}+{c}={total}, {end}"})
    return rows

# --- scores: a mean is worth as much as its error --------------------------------------------------------------------

def mean_and_error(values) -> tuple[float, float]:
    """The mean of one value a problem, and its standard error. Samples of one problem resemble each other, so n of them
    count as one observation: errors are clustered by problem (Miller, arXiv 2411.00640)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, have a right one among them: unbiased, where
    1 - (1 - right / n)^k is too low (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)

def majority(samples: list[dict]) -> float:
    """The score of the answer that most samples give; if several lead, of one of them drawn by lot. A sample without
    an answer does not vote."""
    votes = collections.defaultdict(list)
    for sample in samples:
        if sample["answer"] is not None:
            value = number(sample["answer"])
            votes[plain(sample["answer"]) if value is None else value].append(sample["score"])
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([max(scores) for scores in votes.values() if len(scores) == most])) if votes else 0.0

def measures(samples) -> dict[str, dict[int, float]]:
    """Everything that is measured of one model's samples (rows or a Table): {name: {problem's number: value}}."""
    problems = collections.defaultdict(list)
    for sample in samples:
        problems[sample["number"]].append(sample)
    if not problems:
        raise ValueError("there are no samples to measure")
    n = min(map(len, problems.values()))

    def each(measure) -> dict[int, float]:
        return {i: float(measure(group)) for i, group in sorted(problems.items())}

    def mean(value) -> dict[int, float]:
        return each(lambda group: np.mean([value(sample) for sample in group]))

    found = {f"mean@{n}": mean(lambda s: s["score"])} if n > 1 else {}
    for k in sorted({k for k in (1, 2, 4, 8, 16, 32, 64, n) if k <= n}):
        found[f"pass@{k}"] = each(lambda g, k=k: pass_at_k(len(g), sum(s["score"] > 0 for s in g), k))
    if n > 1:
        found[f"maj@{n}"] = each(majority)
    for name in ("subject", "level"):                   # where there are several, and not as many as lines on a screen
        kinds = {i: group[0].get(name) or "" for i, group in problems.items()}
        for kind in sorted(set(kinds.values()) - {""}) if 1 < len(set(kinds.values())) <= 20 else ():
            found[f"{name} {kind}"] = {i: x for i, x in found["pass@1"].items() if kinds[i] == kind}
    found["truncated"] = mean(lambda s: s["finish_reason"] == "length")
    found["unparsed"] = mean(lambda s: s["verdict"] == "unparsed" and s["finish_reason"] != "length")   # ended boxless
    found["not graded"] = mean(lambda s: s["verdict"] in ("timeout", "crashed"))
    found["tokens"] = mean(lambda s: s["tokens"])
    return found

def summarize(samples) -> dict[str, tuple[float, float]]:
    """{measure: (mean over problems, its standard error)}; "pass@1" is always there."""
    return {name: mean_and_error(list(values.values())) for name, values in measures(samples).items()}

def compare(first, second) -> dict[str, tuple[float, float]]:
    """How much higher the second model's measures are, problem by problem. The error of such paired differences is
    far below that of either score, as what makes a problem hard is hard for both."""
    first, second = measures(first), measures(second)
    pairs = {name: [second[name][i] - x for i, x in first[name].items() if i in second[name]]
             for name in first if name in second}
    return {name: mean_and_error(differences) for name, differences in pairs.items() if differences}

def report(models: dict[str, list[dict]]) -> str:
    """The table that is printed: a measure a line, a model a column, in brackets what it has over the first model."""
    first, *others = models
    columns = {name: (summarize(samples), compare(models[first], samples)) for name, samples in models.items()}
    width = max([28, *(len(name) + 2 for name in models)])
    lines = [f"{'percent ± standard error':30}" + "".join(f"{name:>{width}}" for name in models)]
    for measure in columns[first][0]:
        scale, cells = 1 if measure == "tokens" else 100, []
        for name, (summary, over) in columns.items():
            mean, error, more, its_error = [scale * x for x in (*summary.get(measure, [math.nan] * 2),
                                                                *over.get(measure, [math.nan] * 2))]
            cells.append(f"{mean:.1f} ± {error:.1f}" + (f" ({more:+.1f} ± {its_error:.1f})" if name in others else ""))
        lines.append(f"{measure:30}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)

def draw(models: dict[str, list[dict]], path) -> None:
    """Bars with their errors: pass@k, maj@n, and pass@1 by subject and level."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    summaries = {name: summarize(samples) for name, samples in models.items()}
    bars = [name for name in summaries[next(iter(models))] if name.startswith(("pass@", "maj@", "subject", "level"))]
    figure, axes = pyplot.subplots(figsize=(max(5, 0.5 * len(bars) * len(models)), 4), layout="constrained")
    for i, (name, summary) in enumerate(summaries.items()):
        values = [[100 * x for x in summary.get(bar, (math.nan, math.nan))] for bar in bars]
        places = np.arange(len(bars)) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
        axes.bar(places, [v for v, _ in values], 0.8 / len(models), yerr=[e for _, e in values], capsize=2, label=name)
    axes.set_xticks(range(len(bars)), bars, rotation=30, ha="right")
    axes.set_ylabel("percent, ± standard error")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)      # above, where no bar is behind it
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

# --- evaluation: every problem is a coroutine, from its prompt to its rows -------------------------------------------

class Generator:
    """An engine on a GPU of its own (or on the CPU), for any number of callers at once."""

    def load(self, model: str, options: dict) -> None:
        import torch                                    # here alone: graders start ten times faster without it
        from engine import LLM
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))     # threads wait for the one without a core,
        self.llm, self.finished = LLM(model, **options), {}                 # and the graders need one

    async def answer(self, problem: str, params: dict) -> list[dict]:
        """Whoever waits takes the next step for all; so nobody waits for a batch to be full, or to be done."""
        from engine import SamplingParams
        _, (tokens,) = chat_prompts([{"problem": problem}], self.llm.tokenizer)
        request = self.llm.add_request(tokens, SamplingParams(**params))
        while request not in self.finished:
            self.finished |= {output.request_id: output for output in self.llm.step() if output.finished}
            await asyncio.sleep(0)
        return [{"text": o.text, "tokens": len(o.token_ids), "finish_reason": o.finish_reason}
                for o in self.finished.pop(request).outputs]

SAMPLE = {"model": "utf8", "number": "int64", "sample": "int64", "problem": "utf8", "text": "utf8", "answer": "utf8",
          "gold": "utf8", "score": "float64", "verdict": "utf8", "tokens": "int64", "finish_reason": "utf8",
          "subject": "utf8", "level": "utf8"}

async def record(model: str, number: int, problem: dict, samples: list[dict], graders: Graders) -> list[dict]:
    """One problem's samples {"text", "tokens", "finish_reason"} with their grades."""
    grades = await graders.agrade([(sample["text"], problem["answer"]) for sample in samples])
    given = {"model": model, "number": number, "problem": problem["problem"], "gold": str(problem["answer"]),
             "subject": problem.get("subject", ""), "level": problem.get("level", "")}
    return [given | {"sample": i} | sample | grade._asdict() for i, (sample, grade) in enumerate(zip(samples, grades))]

def one_name(model: str) -> str:
    """M for M/ and ./M, too; the whole path of a folder without a name, as . is; a hub id as it is."""
    path = Path(model)
    return model if not path.is_dir() else str(path.resolve() if path.name in ("", "..") else path)

def check_model(model: str) -> None:
    folder = Path(model)
    if not (folder / "config.json").is_file() and (folder.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)):
        raise FileNotFoundError(f"there is no model in {model}; pass a directory with config.json, or a hub id")
    if folder.is_dir() and not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise FileNotFoundError(f"{model} has no model.safetensors, nor an index of several; copy the whole folder")

def check(config: Config) -> dict:
    """What an engine is asked for each answer; refuses what it, or the pool of graders, would not take."""
    import torch
    from engine import SamplingParams
    dtype = getattr(torch, "float32" if config.dtype in (None, "auto") else config.dtype, None)
    for name, good in {"limit": config.limit >= 0, "max_tokens": config.max_tokens > 0, "graders": config.graders >= 0,
                       "deadline": config.deadline > 0, "memory": 0 < config.memory <= 1,
                       "dtype": isinstance(dtype, torch.dtype) and dtype.is_floating_point}.items():
        if not good:
            raise ValueError(f"{name} = {getattr(config, name)} makes no sense; see python evaluate.py --help")
    if str(config.device or "cpu").partition(":")[0] not in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        raise ValueError(f"device = {config.device}: pass cpu, cuda where there is a GPU, or nothing for all there are")
    params = {name: getattr(config, name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens")}
    return SamplingParams(**params) and params

def identity(model: str) -> str:
    """A hash of all its files: that of a copy is the same, that of a model made anew under its old name is not."""
    from parallel import local_folder
    found = hashlib.sha256()
    for path in sorted(Path(local_folder(model)).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt") and path.stat().st_size:
            found.update(path.name.encode())
            found.update(np.memmap(path, mode="r"))     # some 1 s a GB, and holds none of it in memory
    return found.hexdigest()

def changed(file: Path, model: str, problems: list[dict], n: int) -> bool:
    """Whether a file of samples is of other problems, or of a model that has changed since."""
    table, asked = al.read(file), [(x["problem"], str(x["answer"])) for x in problems for _ in range(n)]
    same = list(zip(table["problem"].to_pylist(), table["gold"].to_pylist())) == asked
    known = table.schema.metadata.get(b"model", b"").decode()       # none before samples said so
    if not same or known not in ("", identity(model)):
        print(f"{model}: evaluated anew, as {'its files' if same else 'the problems'} have changed")
        return True
    print(f"{model}: its samples are kept" + ("" if known else ", though they do not say which weights they are of"))
    return False

def evaluate(model: str, problems: list[dict], config: Config | None = None, label: str = "", **settings) -> tuple:
    """The samples of a model, and summarize(samples). Settings replace those of `config`, by name."""
    config, model, scores = dataclasses.replace(config or Config(), **settings), one_name(str(model)), []
    check_model(model)
    params, schema = check(config), al.Schema(SAMPLE, {"model": identity(model)})
    graders = Graders(config.graders, config.deadline)  # starts actors, unless they run
    gpus = 0 if config.device == "cpu" else int(actors.cluster_resources().get("GPU", 0))
    generators = [actors.remote(Generator).options(num_gpus=min(gpus, 1)).remote()
                  for _ in range(max(1, min(gpus, len(problems))))]
    options = {"dtype": config.dtype or "auto", "device": config.device, "gpu_memory_utilization": config.memory}
    bar = tqdm(total=len(problems), desc=label or Path(model).name, unit="problem")

    async def solve(number: int, problem: dict) -> list[dict]:
        own = params | {"seed": config.seed * 10**6 + number}       # no data set has more problems
        samples = await generators[number % len(generators)].answer.remote(problem["problem"], own)
        rows = await record(model, number, problem, samples, graders)
        scores.extend(row["score"] for row in rows)
        bar.set_postfix_str(f"score {np.mean(scores):.1%}", refresh=False)
        bar.update()
        return rows

    async def solve_all() -> list[list[dict]]:
        await asyncio.gather(*[generator.load.remote(model, options) for generator in generators])
        return await asyncio.gather(*[solve(number, problem) for number, problem in enumerate(problems)])

    try:
        with bar:
            rows = asyncio.run(solve_all())
    finally:
        for generator in generators:
            actors.kill(generator)                      # the next model needs the memory
    table = al.Table.from_pylist(list(itertools.chain(*rows)), schema)
    return table, summarize(table)

def labels(models: list[str]) -> list[str]:
    """The shortest ends of their paths that tell them apart."""
    for length in range(1, 10):
        names = ["/".join(Path(model).parts[-length:]) for model in models]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--model names a model twice: {', '.join(models)}")

def run(config: Config) -> dict:
    """Every model, and what they say side by side, in --out."""
    config = dataclasses.replace(config, model=[one_name(model) for model in config.model])
    out, settings, names, models = Path(config.out), dataclasses.asdict(config), labels(config.model), {}
    held, before = [path.name for path in out.iterdir()] if out.exists() else [], {}
    with contextlib.suppress(OSError, ValueError, TypeError):                           # whatever is there is kept
        before = dict(json.loads((out / "config.json").read_text()))
    if held and not (held == ["config.json"] and before.keys() == settings.keys()):     # died before its first sample
        if not config.resume or "config.json" not in held:
            raise ValueError(f"{out} holds another run or something else: choose another --out, or --resume a run")
        for name in ("data", "limit", "n", "temperature", "top_p", "top_k", "max_tokens", "seed", "dtype"):
            if before.get(name) != settings[name]:
                raise ValueError(f"{out} was made with {name} = {before.get(name)}, not {settings[name]}")
    files = [out / (re.sub(r"[^\w.-]+", "_", model).strip("._") + ".arrow") for model in config.model]
    if len(set(files)) < len(files):                    # as those of a/b and a_b
        raise ValueError(f"the samples of two of {', '.join(config.model)} would be one file; give each an --out")
    for file, model in zip(files, config.model):
        if file.exists() and one_name(other := al.read(file)[0]["model"]) != model:
            raise ValueError(f"{file} has the samples of {other}, not of {model}; choose another --out")
        check_model(model)
    check(config)
    problems = load_problems(config.data)[:config.limit or None]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "config.json", "a") as claim:       # locked while this run lives: one without a sample
        try:                                            # is taken again only if it died
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:                        # or there are no locks on this file system
            if isinstance(error, BlockingIOError) and not config.resume:
                raise ValueError(f"{out} is that of a run under way; choose another --out") from None
        claim.truncate(0)
        print(json.dumps(settings, indent=2), file=claim, flush=True)
        print("\n".join(f"{name:12} {value}" for name, value in settings.items()))
        for name, file, model in zip(names, files, config.model):
            if not file.exists() or changed(file, model, problems, config.n):
                al.write(evaluate(model, problems, config, name)[0], file)
            models[name] = al.read(file).to_pylist()
        print(f"\n{len(problems)} problems of {config.data}, {config.n} samples each, in {out}\n{report(models)}")
        scores = {name: summarize(samples) for name, samples in models.items()}
        known = {model: {name: [None if math.isnan(x) else x for x in pair] for name, pair in found.items()}
                 for model, found in scores.items()}    # of one problem there is no error, and JSON has no NaN
        (out / "scores.json").write_text(json.dumps(known, indent=2) + "\n")
        draw(models, out / "scores.png")
        return scores

# --- show: samples as a person reads them ----------------------------------------------------------------------------

def page(row: dict, title: str) -> str:
    """Short values on one line, long texts below it, and of lists their lengths: whatever columns a file has."""
    short, long = [title], []
    for name, value in row.items():
        if isinstance(value, str) and (len(value) > 60 or "\n" in value):
            long.append(f"{name}:\n{textwrap.indent(value, '    ')}")
        elif value not in (None, ""):
            value = f"{len(value)} values" if isinstance(value, list) else value
            short.append(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return "\n".join([" | ".join(short), *long])

def show(path: str, verdict: str | None = None, start: int = 0) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `show FILE | head` ends quietly
    table = read(path)
    rows = [i for i in range(start, len(table)) if verdict is None or table[i].get("verdict") == verdict]
    if not rows:
        print(f"{path} has {len(table)} rows, and none{f' that is {verdict}' * bool(verdict)} from {start} on")
    for i in rows:
        print(f"{'-' * 120}\n{page(table[i], f'row {i} of {len(table)}')}")
        if sys.stdin.isatty() and sys.stdout.isatty() and input("[enter: next, q: quit] ").strip() == "q":
            break

# --- the demo, and the command line ----------------------------------------------------------------------------------

HARD = [("so \\boxed{\\frac{\\sqrt{8}}{4}}", "\\frac{1}{\\sqrt2}", 1),      # (text, gold, score)
        ("\\boxed{x \\in [0,1)}", "[0,1)", 1), ("\\boxed{1,2,3,4,5}", "3", 0),
        ("\\boxed{\\begin{pmatrix}0.5\\\\2\\end{pmatrix}}", "\\begin{pmatrix}1/2\\\\2\\end{pmatrix}", 1),
        ("\\boxed{(x+1)^2}, as \\boxed{x^2+2x+1}", "(x+1)^2", 1), ("\\boxed{3} or \\boxed{4}", "3", 0),
        ("the answer is \\boxed{3", "3", 0),
        ("\\boxed{" + "1+" * 50_000 + "1}", "50001", 0), ("\\boxed{9^{9^{9^{9}}}}", "x^2", 0),
        ("\\boxed{\\sum_{k=1}^{10^{10}} k^k}", "x^2", 0), ("\\boxed{(3, \\pi)}", "(3, 3.141593)", 1)]

def pupil(name: str, skill: float, problems: list[dict], graders: Graders, n: int = 4) -> list[dict]:
    """Samples of somebody who adds right with a chance of skill - 0.03 * the answer, and otherwise slips by one."""
    rng, rows = random.Random(name), []
    for number, problem in enumerate(problems):
        gold = int(problem["answer"])
        answers = [gold if rng.random() < skill - 0.03 * gold else gold + 1 for _ in range(n)]
        samples = [{"text": f"It is \\boxed{{{x}}}.", "tokens": 8, "finish_reason": "stop"} for x in answers]
        rows += asyncio.run(record(name, number, problem, samples, graders))
    return rows

def demo() -> None:
    """Hard answers for the graders; then a model that was never trained beside two pupils whose skill is known."""
    from parallel import tiny_model
    graders, start = Graders(2, deadline=3), time.perf_counter()
    grades = graders.grade([(text, gold) for text, gold, _ in HARD])
    killed = sum(grade.verdict == "timeout" for grade in grades)
    for (text, gold, _), grade in zip(HARD, grades):
        text = text if len(text) < 50 else f"{text[:20]}... ({len(text):,} characters)"
        print(f"{grade.verdict:>9}  {text:46} gold {gold}")
    print(f"{len(HARD)} answers in {time.perf_counter() - start:.1f} s; {killed} graders were killed, after 3 s each\n")
    problems = arithmetic(48, held_out=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder, hidden_size=64, num_hidden_layers=2)
        table, _ = evaluate(folder, problems, n=4, max_tokens=32)
    models = {"pupil": pupil("pupil", 0.9, problems, graders), "better pupil": pupil("better", 1.0, problems, graders),
              "random model": table.to_pylist()}
    print(f"{len(problems)} problems, 4 samples each, as {problems[0]['problem']}\n{report(models)}\n\nA sample:")
    print(page(table[0], "row 0"))
    true = 0.9 - 0.03 * np.mean([int(problem["answer"]) for problem in problems])
    mean, error = summarize(models["pupil"])["pass@1"]
    print(f"\nthe pupil's true pass@1 is {100 * true:.1f}, measured {100 * mean:.1f} ± {100 * error:.1f}")
    if abs(mean - true) > 4 * error or [grade.score for grade in grades] != [score for _, _, score in HARD]:
        sys.exit("the demo failed: a hard answer has another grade, or the pupil another score, than they must have")

COMMANDS = {"show": "page through a file of samples or rollouts", "arithmetic": "write problems of the demos' task",
            "problems": "write those problems of a data set that are worth learning from"}

def command(name: str) -> None:
    parser = argparse.ArgumentParser(prog=f"evaluate.py {name}", description=COMMANDS[name])
    if name == "show":
        parser.add_argument("path", metavar="FILE")
        parser.add_argument("--verdict", choices=["right", "wrong", "unparsed", "timeout", "crashed"], help="only such")
        parser.add_argument("--start", type=int, default=0, help="the first row")
        args = parser.parse_args(sys.argv[2:])
        if args.start < 0 or not Path(args.path).is_file():
            parser.error("--start counts from 0" if args.start < 0 else f"there is no file {args.path}")
        return show(**vars(args))
    parser.add_argument("--out", required=True, help="a .jsonl file")
    if name == "arithmetic":
        parser.add_argument("--n", type=int, default=1000)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--held_out", "--held-out", action="store_true", help="the fifth that training never shows")
        parser.add_argument("--boxed", type=float, default=1.0, help="share of the solutions that box their answer")
        args = parser.parse_args(sys.argv[2:])
        rows = arithmetic(args.n, args.seed, args.held_out, args.boxed)
    else:
        parser.add_argument("--data", required=True, help="as --data of an evaluation")
        parser.add_argument("--split", default="train", help="of a data set of the hub")
        parser.add_argument("--model", required=True, help="whose tokenizer counts")
        parser.add_argument("--max_prompt", "--max-prompt", type=int, default=1024, help="in tokens")
        args = parser.parse_args(sys.argv[2:])
        found = load_problems(args.data, args.split)
        from transformers import AutoTokenizer
        rows = worth_learning(found, AutoTokenizer.from_pretrained(args.model), args.max_prompt)
        if not rows:
            raise ValueError(f"none of the {len(found):,} problems of {args.data} is worth learning from: every prompt "
                             f"has over --max_prompt {args.max_prompt} tokens, or an answer that is soon guessed")
        print(f"{len(rows):,} of {len(found):,} problems of {args.data} go into {args.out}")
    al.Table.from_pylist(rows).to_jsonl(args.out)

def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return command(sys.argv[1])
    if len(sys.argv) == 1:
        return demo()
    from transformers import HfArgumentParser
    run(Config(**vars(HfArgumentParser(Config).parse_args())))

if __name__ == "__main__":
    main()
