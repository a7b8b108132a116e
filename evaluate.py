"""evaluate: answers, grades, scores.

A model answers math problems, each answer is graded against the gold one, and the grades become scores with their
errors. `gold` is the right answer, `answer` is what a model put into its box. All is generated first, then graded:

    problems --> Generator 0, 1, ... --> text --> boxes --> quick: spelled the same, or other numbers? --> right, wrong
                 one engine a GPU                             | hard to say                                  ^
                                                              +--> Grader 0, 1, ...: math-verify ------------+
                                                                   overruns its deadline: killed, and replaced
Public names: grade(answer, gold), extract(text), boxes(text), Graders; read_rows, load_problems, INSTRUCTION,
chat_messages, chat_prompts, arithmetic; Generator (an engine as an actor); evaluate, summarize, compare, report, show.

    python evaluate.py                                                  the demo, in under a minute
    python evaluate.py --model Qwen/Qwen3-0.6B --data math500 --n 8     pass@1, mean@8, pass@8, maj@8, on every GPU
    python evaluate.py --model runs/sft runs/ppo --data test.jsonl      two models, and their paired difference
    python evaluate.py show evaluation/runs_ppo.arrow --verdict wrong   reads samples as a person would
    python evaluate.py arithmetic --n 1000 --seed 0 --out sums.jsonl    the task that the demos learn (--held_out: test)
"""
import collections, functools, importlib, json, logging, math, os, random, re, resource, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

import actors
import arrowlite as al

@dataclass
class Config:
    model: list[str] = field(default_factory=lambda: ["Qwen/Qwen3-0.6B"])   # directories or hub ids, compared in order
    data: str = "math500"           # math500, gsm8k, a .jsonl, .arrow or .parquet file, or a hub id
    limit: int = 0                  # only the first so many problems; 0: all
    n: int = 1                      # samples of each problem
    temperature: float = 0.6        # 0 is greedy
    top_p: float = 0.95             # the fewest tokens that hold this much of the probability
    top_k: int = -1                 # the most probable tokens; -1: all
    max_tokens: int = 3072          # of an answer; one that is cut off here counts as truncated
    seed: int = 0                   # the same seed gives the same samples, on any number of GPUs
    device: str | None = None       # cpu, cuda; otherwise every GPU there is
    runtime: Literal["actors", "ray"] = "actors"    # what starts the processes: actors.py, or the real Ray
    out: str = "evaluation"         # a directory: samples, scores.json, config.json
    resume: bool = False            # keep the samples in --out, if they are of the same problems and settings

# --- answers: what stands in the box, and when two of them are surely the same ---------------------------------------
def boxes(text):
    """What stands in every balanced \\boxed{} outside of thinking, if anything; of nested ones the inner counts."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    opened = []                     # where the box of each open brace begins; 0 for a brace of another kind
    last = 0                        # where the last box that was closed began
    found = []
    for mark in re.finditer(r"(\\boxed\s*\{)|\\.|(\{)|(\})", text, re.DOTALL):         # \{ is text, and does not count
        if mark[1] or mark[2]:
            opened.append(mark.end() if mark[1] else 0)
        elif mark[3] and opened:
            start = opened.pop()
            if start > last:        # else a box stood in it
                found.append(text[start:mark.start()].strip())
                last = start
    return [answer for answer in found if answer]

def extract(text):
    """The answer: what stands in the last balanced \\boxed{}."""
    return (boxes(text) or [None])[-1]

NUMBER = r"[+-]?\d{1,40}(\.\d{0,40})?"
WORD = r"(?i:yes|no|true|false)|[A-Z]{3,}"              # to math-verify CAB is ABC: products of letters
def tidy(answer):
    """Without what math-verify cannot read: a full stop, 1\\,234, another sign for the empty set."""
    answer = answer.strip().removesuffix(".").replace("\\varnothing", "\\emptyset")
    return re.sub(r"(?<=\d)\\[,!: ](?=\d{3})", "", answer)

def quick(answer, gold):
    """The verdict where it takes no sympy. Else None, also of close numbers: math-verify rounds (0.333333 is 1/3)."""
    a = tidy(answer)
    b = tidy(gold)
    if a == b:
        return True
    if re.fullmatch(WORD, a) and re.fullmatch(WORD, b):
        return a.lower() == b.lower()
    both_numbers = re.fullmatch(NUMBER, a) and re.fullmatch(NUMBER, b)
    if both_numbers and abs(float(a) - float(b)) > 1e-5 or len(a) > 2000:
        return False

# --- grading: math-verify, in processes that are made to be killed ---------------------------------------------------
class Grade(NamedTuple):
    score: float                    # 1.0 or 0.0
    verdict: str                    # right, wrong, unparsed (no box), timeout, crashed
    answer: str | None              # what was graded

class Grader:
    """The process in which sympy runs. Some answers make it hang (9^{9^{9^9}}), crash, or ask for all the memory."""
    def __init__(self):
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))        # who asks for 4 GiB gets a MemoryError
        from math_verify import parse, verify           # here alone: nobody else needs sympy
        logging.disable()                               # of every answer that it cannot read
        self.parse = functools.lru_cache(1000)(parse)
        self.verify = verify
    def equal(self, answers, gold):
        """No timeouts: theirs are signals, which sympy may swallow; ours is a kill."""
        gold, *answers = [self.parse(f"\\boxed{{{tidy(x)}}}", parsing_timeout=None) for x in [gold, *answers]]
        return all(self.verify(gold, answer, timeout_seconds=None) for answer in answers)

class Graders:
    """A pool of Grader processes, each with a thread here that hands it one row at a time. So a row that hangs costs
    its own deadline and nothing else. `ray` is the module to run on: actors, or the real Ray."""
    def __init__(self, workers=0, deadline=5.0, ray=actors):
        self.threads = ThreadPoolExecutor(workers or os.cpu_count())
        self.own = threading.local()                    # .worker: the process of this thread, if it has one by now
        self.deadline = deadline
        self.ray = ray
        ray.init(ignore_reinit_error=True)
    def grade(self, pairs):
        """The grades of (text, gold) pairs, in their order."""
        grades = self.threads.map(self.grade_one, pairs)
        return list(tqdm(grades, "grading", len(pairs), disable=None))
    def grade_one(self, pair):
        """Of several boxes all have to be right: who offers two different answers has none."""
        text, gold = map(str, pair)
        answers = boxes(text)
        known = {quick(answer, gold) for answer in answers}
        verdict = "wrong"
        if not answers:
            verdict = "unparsed"
        elif known == {True}:
            verdict = "right"
        elif False not in known:
            verdict = self.ask(answers, gold)
        return Grade(float(verdict == "right"), verdict, extract(text))
    def ask(self, answers, gold):
        for _ in range(2):                              # once more if it dies: somebody else may have killed it
            try:
                if not hasattr(self.own, "worker"):
                    self.own.worker = self.ray.remote(Grader).remote()
                    self.ray.get(self.own.worker.equal.remote(["1"], "1"))     # all is loaded: now the clock may run
                right = self.ray.get(self.own.worker.equal.remote(answers, gold), timeout=self.deadline)
                return "right" if right else "wrong"
            except self.ray.exceptions.RayError as error:
                self.ray.kill(self.own.worker)
                del self.own.worker
                if isinstance(error, TimeoutError):
                    return "timeout"
        return "crashed"

@functools.cache
def one_grader():
    return Graders(1)
def grade(answer, gold):
    """1.0 if the text's boxed answer is the gold one, else 0.0."""
    return one_grader().grade_one((answer, gold)).score

# --- problems: rows of {"problem", "answer"}, whatever their columns were called -------------------------------------
INSTRUCTION = "Work step by step and put the final answer inside \\boxed{}."
HUB = {"math500": ["HuggingFaceH4/MATH-500"], "gsm8k": ["openai/gsm8k", "main"]}
KINDS = (".jsonl", ".json", ".arrow", ".parquet")
def read_rows(data, split="train"):
    """(where it stands, row) one by one: of a file, of a folder of files, or of a data set of the hub."""
    path = Path(data)
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.suffix in KINDS):
            yield from read_rows(file)
        return
    if not path.exists():
        if path.suffix in KINDS or data.count("/") != 1 and data not in HUB:
            raise FileNotFoundError(f"there is no {data}: pass a {', '.join(KINDS)} file, or a hub id")
        import datasets                                 # here alone: files need no network
        rows = datasets.load_dataset(*HUB.get(data, [data]), split=split, streaming=True)
    elif path.suffix == ".parquet":
        import pyarrow.parquet                          # here alone: other files need no pyarrow
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix in (".jsonl", ".json"):            # one by one: a column could not hold 5 and then x+1
        rows = open(path, "rb")
    else:
        rows = al.read(path)
    for i, row in enumerate(rows, 1):
        if isinstance(row, bytes):
            try:
                row = {**json.loads(row.strip() or "{}")}
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{data}, line {i}: not a JSON object: {error}") from None
        if row:
            yield f"{data}, line {i}", row

def load_problems(data, split="test", columns=False):
    """The rows as problems. With their own `columns`, for who grades by those, they need no answer."""
    problems = []
    for where, row in read_rows(data, split):
        problem = text_of(row, "problem", "question", "prompt")
        answer = text_of(row, "final_answer", "answer").rpartition("####")[2].strip()     # GSM8K: working #### 18
        answer = extract(answer or text_of(row, "solution")) or answer            # MATH: the solution ends in a box
        if not problem or not (answer or columns):
            raise ValueError(f"{where}: no {'answer' if problem else 'problem'} in {', '.join(row)}: see README.md")
        problems.append({"problem": problem, "answer": answer} | ({"columns": row} if columns else {}))
    if not problems:
        raise ValueError(f"{data} has no rows")
    return problems

def text_of(row, *names):
    """The first of these columns that holds a text or a number: not a list of messages, nor nothing."""
    texts = [str(x).strip() for x in map(row.get, names) if isinstance(x, str | int | float)]
    return next(filter(None, texts), "")

def chat_messages(problem):
    return [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
def chat_prompts(problems, tokenizer):
    """What a model is given for each problem: as text, and as tokens."""
    texts = [tokenizer.apply_chat_template(chat_messages(problem["problem"]), tokenize=False,
                                           add_generation_prompt=True, enable_thinking=False) for problem in problems]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]

def arithmetic(n, seed=0, held_out=False, boxed=1.0):
    """The demos' task, sums in two steps. A fifth of all problems, picked by hash, is drawn only if held_out: no row of
    a training set is ever one of a test set. A share of `boxed` of the solutions puts the answer into a box."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < n:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        problem = f"{a}+{b}+{c}=?"
        if (random.Random(problem).random() < 0.2) == held_out:
            total = a + b + c
            end = f"\\boxed{{{total}}}" if random.Random(len(rows)).random() < boxed else f"so {total}"
            rows.append({"problem": problem, "answer": str(total),
                         "solution": f"{a}+{b}={a + b}, {a + b}+{c}={total}, {end}"})
    return rows

# --- scores: a mean is worth as much as its error --------------------------------------------------------------------
def mean_and_error(values):
    """`values` are one a problem, as samples of a problem resemble each other (clustered errors, arXiv 2411.00640)."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean(), error

def pass_at_k(n, right, k):
    """The chance that k of n samples have a right one among them: unbiased, where 1 - (1 - right / n)^k is too low
    (arXiv 2107.03374). `right` is a number or an array of them."""
    return 1 - np.prod([(n - right - i) / (n - i) for i in range(k)], axis=0)

def majority(samples):
    """The score of the answer that most samples give, right ones being the same; if several lead, of one by lot."""
    votes = collections.Counter(x["score"] or tidy(x["answer"]) for x in samples if x["answer"] is not None)
    leaders = [answer for answer in votes if votes[answer] == max(votes.values())]
    return (1.0 in leaders) / (len(leaders) or 1)

def measures(samples):
    """{measure: a value for each problem, in order} of one model's samples, rows or a Table; each problem has n."""
    rows = sorted(samples, key=lambda sample: sample["number"])
    n = sum(row["number"] == rows[0]["number"] for row in rows)
    def column(name):                                   # [problems, n]
        return np.array([row[name] for row in rows]).reshape(-1, n)
    score = column("score")
    truncated = column("finish_reason") == "length"
    right = (score > 0).sum(1)
    found = {f"pass@{k}": pass_at_k(n, right, k) for k in (1, 2, 4, 8, 16, 32, 64, n) if k <= n}
    found[f"mean@{n}"] = score.mean(1)
    found[f"maj@{n}"] = np.array([majority(rows[i:i + n]) for i in range(0, len(rows), n)])
    found["truncated"] = truncated.mean(1)
    found["unparsed"] = (~truncated & (column("verdict") == "unparsed")).mean(1)        # it ended, without a box
    found["tokens"] = column("tokens").mean(1)
    return found

def summarize(samples):
    """{measure: (mean over problems, its standard error)}; "pass@1" is always there."""
    return {name: mean_and_error(values) for name, values in measures(samples).items()}

def compare(first, second):
    """How much higher the second model's measures are on the same problems. The error of such paired differences is
    far below that of either score, as what makes a problem hard is hard for both."""
    before = measures(first)
    after = measures(second)
    return {name: mean_and_error(after[name] - before[name]) for name in before}

def report(models):
    """The table that is printed: a measure a line; a column for each model, and for what it has over the first one."""
    first, *others = models
    columns = {name: summarize(models[name]) for name in models}
    for name in others:
        columns[f"{name} - {first}"] = compare(models[first], models[name])
    lines = ["percent ± standard error" + "".join(f"{name[-28:]:>30}" for name in columns)]
    for measure in columns[first]:
        line = measure.ljust(24)
        for found in columns.values():
            mean, error = np.multiply(found[measure], 1 if measure == "tokens" else 100)
            line += f"{mean:.1f} ± {error:.1f}".rjust(30)
        lines.append(line)
    return "\n".join(lines)

# --- evaluation ------------------------------------------------------------------------------------------------------
class Generator:
    """An engine as an actor: one GPU's, or one rank of a tensor-parallel one, whose ranks all get the same calls. One
    GPU's is exact, unless `options`, other arguments of LLM, say otherwise. A call is a batch. The template's end of
    turn ends an answer: base models know only the end of text, and go on."""
    def __init__(self, model, tp=1, options=None):
        import torch                                    # here alone: graders start ten times faster without it
        from engine import LLM, end_of_turn
        torch.set_num_threads(1)                        # processes share the cores
        exact = tp == 1 and torch.cuda.is_available()
        self.llm = LLM(model, tensor_parallel_size=tp, **{"exact": exact} | (options or {}))
        self.stop = {"stop_token_ids": [end_of_turn(self.llm.tokenizer)]}               # or [None], which stops nothing
    def generate(self, prompts, params, weights=None):
        """A list of samples for each prompt. params are SamplingParams' arguments: for all prompts, or one dict a
        prompt. weights of another version than the engine's are loaded first."""
        import torch
        from engine import SamplingParams
        if weights and weights["version"] != self.llm.weight_version:
            warnings.filterwarnings("ignore", ".*not writable")         # they are only copied from
            tensors = {name: torch.from_numpy(data).view(dtype).view(shape)
                       for name, (data, dtype, shape) in weights["tensors"].items()}
            self.llm.update_weights(tensors, version=weights["version"])
        each = params if isinstance(params, list) else [params] * len(prompts)
        settings = [SamplingParams(**self.stop | one) for one in each]
        outputs = self.llm.generate(prompts, settings)
        return [[self.sample(one) for one in output.outputs] for output in outputs]
    def sample(self, output):
        return {"text": output.text, "token_ids": np.array(output.token_ids, np.int32),
                "logprobs": np.array(output.logprobs, np.float32),
                "versions": np.array(output.versions, np.int32), "finish_reason": output.finish_reason}

def sampling(config):
    from engine import SamplingParams
    params = {name: getattr(config, name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens", "seed")}
    SamplingParams(**params)                            # what an engine would refuse is refused before one is started
    return params
def planned(model, problems, config):
    """What is known of each sample before it is made: --resume keeps those that agree with it, and no others."""
    settings = f"{len(problems)} problems, {sampling(config)}"
    return [{"model": str(model), "number": i, "problem": problem["problem"], "gold": problem["answer"],
             "settings": settings} for i, problem in enumerate(problems) for _ in range(config.n)]

def evaluate(model, problems, config=None, **settings):
    """The samples of a model, and summarize(samples). Settings replace those of `config`, by name."""
    from parallel import local_folder
    from transformers import AutoTokenizer
    config = replace(config or Config(), **settings)
    folder = local_folder(model)
    _, prompts = chat_prompts(problems, AutoTokenizer.from_pretrained(folder))
    seeded = [sampling(config) | {"seed": config.seed * 10**6 + i} for i in range(len(problems))]
    ray = importlib.import_module(config.runtime)
    graders = Graders(ray=ray)                          # starts the runtime, unless it runs
    gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise ValueError("--device cuda: there is no GPU here; leave it out, or pass cpu")
    count = max(1, gpus)
    generator = ray.remote(Generator).options(num_gpus=min(gpus, 1))
    engines = [generator.remote(folder, 1, {"device": config.device}) for _ in range(count)]
    shares = ray.get([engine.generate.remote(prompts[i::count], seeded[i::count]) for i, engine in enumerate(engines)])
    for engine in engines:
        ray.kill(engine)                                # the next model needs the memory
    samples = [sample for i in range(len(problems)) for sample in shares[i % count][i // count]]    # in their order
    rows = planned(model, problems, config)
    grades = graders.grade([(sample["text"], row["gold"]) for sample, row in zip(samples, rows)])
    for row, sample, grade in zip(rows, samples, grades):
        row |= {name: sample[name] for name in ("text", "finish_reason")} | grade._asdict()
        row["tokens"] = len(sample["token_ids"])
    return al.Table.from_pylist(rows), summarize(rows)

def run(config):
    """Every model, and what they say side by side, in --out."""
    out = Path(config.out)
    if out.exists() and not config.resume:
        raise ValueError(f"{out} is there already: choose another --out, or --resume what it holds")
    problems = load_problems(config.data)[:config.limit or None]
    models = {}
    for model in config.model:
        file = out / (model.strip("./").replace("/", "_") + ".arrow")
        if file.exists():
            samples = al.read(file).to_pylist()
            plan = planned(model, problems, config)
            if [row | known for row, known in zip(samples, plan)] != samples:               # the plan changes some
                raise ValueError(f"{file} has samples of another model, other problems or settings: change --out")
            print(f"{model}: the samples in {file} are kept")
        else:
            table, _ = evaluate(model, problems, config)
            out.mkdir(parents=True, exist_ok=True)
            al.write(table, file)
            samples = table.to_pylist()
        models[model] = samples
    print(f"\n{len(problems)} problems of {config.data}, {config.n} samples each, in {out}\n{report(models)}")
    scores = {model: summarize(samples) for model, samples in models.items()}
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2))
    (out / "scores.json").write_text(json.dumps(scores).replace("NaN", "null"))   # the error of one problem
    return scores

# --- the demo, and the command line ----------------------------------------------------------------------------------
def show(path, verdict=None):
    """The rows of any file as a person reads them."""
    for where, row in read_rows(path):
        if verdict in (None, row.get("verdict")):
            print(f"--- {where} ---")
            for name, x in row.items():
                print(f"{name}: {x if isinstance(x, str) else str(x)[:100]}")

def demo():
    """A tiny model learns to write sums for some seconds, and is examined on others long before it is good at them."""
    import parallel, tempfile, torch
    from transformers import AutoTokenizer
    torch.set_num_threads(1)                            # such small matrices are not worth waking others up
    def loss(model, hidden, batch):
        logprobs, _ = model.logprobs(hidden[batch["predict"]], batch["targets"])
        return -logprobs.mean(), None
    with tempfile.TemporaryDirectory() as folder:
        parallel.tiny_model(folder, hidden_size=64, num_hidden_layers=2)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = parallel.Qwen3.from_pretrained(folder)
        optimizer = parallel.AdamW(model, lr=3e-3)
        for step in range(100):
            rows = arithmetic(8, seed=step)
            texts, _ = chat_prompts(rows, tokenizer)
            whole = [text + row["solution"] + tokenizer.eos_token for text, row in zip(texts, rows)]
            parallel.run(model, [parallel.micro_batch(tokenizer(whole)["input_ids"])], loss)
            optimizer.step()
        model.save_pretrained(folder)
        table, _ = evaluate(folder, arithmetic(50, held_out=True), n=4, max_tokens=48)
    samples = table.to_pylist()
    print(report({"after 100 steps": samples}))
    for verdict in ("right", "wrong"):
        row = next(row for row in samples if row["verdict"] == verdict)
        print(f"\n{verdict}: {row['problem']} {row['text']} (gold: {row['gold']})")

@dataclass
class Show:
    path: str                       # an Arrow, jsonl or parquet file
    verdict: str | None = None      # only such: right, wrong, unparsed, timeout, crashed

@dataclass
class Sums:
    out: str                        # a .jsonl file
    n: int = 1000                   # how many
    seed: int = 0                   # the same seed, the same sums
    held_out: bool = False          # the fifth that training never shows
    boxed: float = 1.0              # share of the solutions that box their answer

def main():
    from parallel import arguments, mistakes
    command, *flags = sys.argv[1:] or ["demo"]
    with mistakes():
        if command == "demo":
            demo()
        elif command == "show":
            show(**asdict(arguments(Show, ["--path", *flags])))
        elif command == "arithmetic":
            settings = asdict(arguments(Sums, flags))
            with open(settings.pop("out"), "x") as file:                # never over what is there
                for row in arithmetic(**settings):
                    print(json.dumps(row), file=file)
        else:
            run(arguments(Config))

if __name__ == "__main__":
    main()
