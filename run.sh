#!/usr/bin/env bash
# The whole project by one command. `bash run.sh help` lists the stages.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
usage: bash run.sh [STAGE] [NAME=VALUE ...]

  (none)      the pipeline, stage after stage: model, data, sft, evaluate, ppo, evaluate. What is there already is not
              done again, and what was interrupted goes on
  model       find the base model; on a CPU, make a tiny one
  data        write what is learned from, and what is asked in the end
  sft         supervised fine-tuning, and the merge of its shards into a model directory
  ppo         reinforcement learning from there, and its merge
  evaluate    ask all models there are, and print one table of their scores
  demo [F]    the demo of one of the eight files, or of all: bash run.sh demo engine
  test        ruff and the test suite; `test all` adds the long checks, other words go to pytest (`test -k jsonl`)
  setup       only install what the other stages need
  help        this text

  GPUS=8      how many to use; by default all. With DEVICE=cpu, processes in their place (2)
  DEVICE=cpu  the default where there is no GPU; then a tiny model learns to add, unless MODEL names another
  MODEL=      a model directory or hub id                 (Qwen/Qwen3-0.6B-Base)
  OUT=        where everything goes                       (runs/gpu or runs/cpu)
  SFT_DATA=   problems with solutions: .jsonl, hub id     (NotASI/NuminaMath-CoT-Small-Hard-200k)
  RL_DATA=    problems with answers                       (zwhe99/DeepMath-103K)
  TEST_DATA=  those that are asked in the end             (math500)
  SFT_STEPS=, PPO_STEPS=      fewer steps than there are by default
  SFT_FLAGS=, PPO_FLAGS=, EVAL_FLAGS=     further flags of sft.py, ppo.py, evaluate.py: PPO_FLAGS="--advantage grpo"

Paths are seen from this folder. What OUT was begun with (MODEL, SFT_DATA, RL_DATA) need not be said again.
Everything is installed into the active virtual environment, or else into .venv, which is made if need be.
TEXT
}

# --- set-up: a virtual environment with what pyproject.toml asks for ---

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "run.sh: no Python 3.10 or newer was found; install one first" >&2
    return 1
}

setup() {       # setup [EXTRA]: the packages of the project, and of one of its extras
    if [[ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
        local python
        python=$(find_python) || return 1
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            echo "run.sh: making .venv with $("$python" --version)"
            "$python" -m venv --clear .venv ||
                { echo "run.sh: python -m venv failed; on Debian: apt install python3-venv" >&2; return 1; }
        fi
        VIRTUAL_ENV=$PWD/.venv
        export VIRTUAL_ENV PATH=$PWD/.venv/bin:$PATH
    fi
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip || return 1
    local missing
    missing=$(python - "${1:-}" <<'PYTHON'
import importlib.metadata as metadata, sys
from pip._vendor.packaging.requirements import Requirement
try:
    import tomllib
except ImportError:                                 # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for line in project["dependencies"] + project["optional-dependencies"].get(sys.argv[1], []):
    need = Requirement(line)
    try:
        here = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        here = None
    if here is None or not need.specifier.contains(here, prereleases=True):
        print(line)
PYTHON
    ) || return 1
    if [[ -n "$missing" ]]; then
        echo "run.sh: installing" $missing
        local packages
        mapfile -t packages <<<"$missing"
        python -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    fi
}

stage() {       # stage NAME COMMAND...: run it, and name it if it fails
    local name=$1
    shift
    echo "=== $name ==="
    "$@" || { local code=$?; echo "run.sh: stage '$name' failed (exit $code)" >&2; exit "$code"; }
}

# --- the pipeline: what runs where; a model is there when its weights are, which come last and whole ---

record() {      # record NAME...: what OUT has was made from these
    local name
    for name; do echo "$name=${!name}" >>"$OUT/settings"; done
}

recall() {      # from there; other data, or another model, would be taken for what OUT has already
    local name was
    while IFS== read -r name was; do
        if [[ ${!name:-$was} != "$was" ]]; then
            echo "run.sh: $OUT was begun with $name=$was; take another OUT for ${!name}" >&2
            return 2
        fi
        [[ $was == "$OUT"/* ]] || declare -g "$name=$was"
    done <"$OUT/settings"
}

settle() {      # devices and sizes, from what the machine has and what the caller said
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    DEVICE=${DEVICE:-$([[ $gpus -gt 0 ]] && echo cuda || echo cpu)}
    GPUS=${GPUS:-$([[ $DEVICE == cuda ]] && echo "$gpus" || echo 2)}
    if [[ ! $DEVICE =~ ^(cuda|cpu)$ || ! $GPUS =~ ^[1-9][0-9]*$ || ($DEVICE == cuda && $GPUS -gt $gpus) ]]; then
        echo "run.sh: DEVICE is cuda or cpu, GPUS at least 1 and at most the $gpus there are; got $DEVICE, $GPUS" >&2
        return 2
    fi
    if [[ $DEVICE == cpu ]]; then
        export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=      # processes share the cores
    else
        CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$GPUS" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}")
        export CUDA_VISIBLE_DEVICES
    fi
    OUT=${OUT:-runs/$([[ $DEVICE == cuda ]] && echo gpu || echo cpu)}
    mkdir -p "$OUT" || return 1
    if [[ -f $OUT/settings ]]; then recall || return 2; fi
    sums=$([[ $DEVICE == cpu && -z ${MODEL:-} ]] && echo yes || true)       # a tiny model that learns to add
    if [[ -n $sums ]]; then
        if [[ -n ${SFT_DATA:-}${RL_DATA:-}${TEST_DATA:-} ]]; then
            echo "run.sh: without a GPU and a MODEL, a tiny model learns sums of its own; say MODEL= to use other data" >&2
            return 2
        fi
        MODEL=$OUT/base SFT_DATA=$OUT/solutions.jsonl PROBLEMS=$OUT/solutions.jsonl TEST_DATA=$OUT/test.jsonl
        sft_flags=(--batch 16 --steps "${SFT_STEPS:-600}" --lr 3e-3 --min_lr 3e-4 --warmup 0.05 --max_tokens 4096
                   --log_every 100)
        ppo_flags=(--batch 128 --steps "${PPO_STEPS:-24}" --max_prompt 128 --max_response 40 --minibatches 2 --lr 2e-4
                   --critic_lr 1e-3 --warmup 5 --eval_every 8 --eval_temperature 1 --log_every 4 --graders 1)
        eval_flags=(--n 4 --temperature 1 --top_p 1 --max_tokens 40)
    else
        MODEL=${MODEL:-Qwen/Qwen3-0.6B-Base} SFT_DATA=${SFT_DATA:-NotASI/NuminaMath-CoT-Small-Hard-200k}
        RL_DATA=${RL_DATA:-zwhe99/DeepMath-103K} PROBLEMS=$OUT/problems.jsonl TEST_DATA=${TEST_DATA:-math500}
        sft_flags=(${SFT_STEPS:+--steps "$SFT_STEPS"})      # all else is as the files have it by default
        ppo_flags=(${PPO_STEPS:+--steps "$PPO_STEPS"})
        eval_flags=(--n 4)
    fi
    read -rd '' -a more <<<"${SFT_FLAGS:-}" || sft_flags+=("${more[@]}")       # 1 is the end of what it reads
    read -rd '' -a more <<<"${PPO_FLAGS:-}" || ppo_flags+=("${more[@]}")
    read -rd '' -a more <<<"${EVAL_FLAGS:-}" || eval_flags+=("${more[@]}")
    if [[ $DEVICE == cpu ]]; then
        eval_flags+=(--device cpu)
    fi
}

launch() {      # launch PROCESSES FILE FLAGS...
    local count=$1
    shift
    if [[ $count == 1 ]]; then python "$@"; else torchrun --standalone --nproc-per-node "$count" "$@"; fi
}

layout() {      # how a number of processes shares a model: four and more split it both ways
    if [[ $(($1 % 4)) == 0 ]]; then echo "--tp 2 --pp 2"; fi
}

make_model() {
    if [[ -n $sums && ! -f $MODEL/tokenizer.json ]]; then
        python -c 'import parallel, sys; parallel.tiny_model(sys.argv[1], hidden_size=64, num_hidden_layers=2)' "$MODEL"
    fi
    python -c 'import parallel, sys; print("the model is in", parallel.local_folder(sys.argv[1]))' "$MODEL" 2>"$OUT/error" ||
        { tail -n 1 "$OUT/error" >&2
          echo "run.sh: on a machine that reaches the hub, run  hf download $MODEL --local-dir models/base" >&2
          echo "run.sh: then, with that folder here,           bash run.sh MODEL=models/base" >&2
          return 1; }
}

make_data() {
    if [[ -n $sums ]]; then
        [[ -f $SFT_DATA ]] || python evaluate.py arithmetic --n 10000 --boxed 0.5 --out "$SFT_DATA" || return 1
        [[ -f $TEST_DATA ]] || python evaluate.py arithmetic --n 200 --seed 1 --held-out --out "$TEST_DATA" || return 1
    fi
    if [[ ! -f $OUT/sft.arrow ]]; then
        python sft.py prepare --data "$SFT_DATA" --model "$MODEL" --out "$OUT/sft.arrow" ||
            { without_a_hub SFT_DATA "$SFT_DATA"; return 1; }
        record MODEL SFT_DATA
    fi
    if [[ ! -f $PROBLEMS ]]; then
        python evaluate.py problems --data "$RL_DATA" --model "$MODEL" --out "$PROBLEMS" ||
            { without_a_hub RL_DATA "$RL_DATA"; return 1; }
        record RL_DATA
    fi
    python -c 'import evaluate, sys; evaluate.load_problems(sys.argv[1])' "$TEST_DATA" ||
        { without_a_hub TEST_DATA "$TEST_DATA"; return 1; }
}

without_a_hub() {
    echo "run.sh: if the hub cannot be reached, save $2 as a .jsonl file (a row a line) and say $1=that/file.jsonl" >&2
}

needs() {       # needs FILE STAGE
    [[ -f $1 ]] || { echo "run.sh: there is no $1, which the stage '$2' makes; run that first" >&2; return 1; }
}

run_sft() {
    [[ -f $OUT/sft-model/model.safetensors ]] && { echo "$OUT/sft-model is there"; return; }
    needs "$OUT/sft.arrow" data || return 1
    launch "$GPUS" sft.py --model "$MODEL" --data "$OUT/sft.arrow" --out "$OUT/sft" --device "$DEVICE" --resume \
        $(layout "$GPUS") "${sft_flags[@]}" && python parallel.py merge "$OUT/sft" "$OUT/sft-model"
}

run_ppo() {     # half of the GPUs train, the others generate; a single one does both
    [[ -f $OUT/ppo-model/model.safetensors ]] && { echo "$OUT/ppo-model is there"; return; }
    needs "$PROBLEMS" data && needs "$OUT/sft-model/model.safetensors" sft || return 1
    local trainers=$((GPUS > 1 ? GPUS / 2 : 1)) generators=()
    if [[ $DEVICE == cpu ]]; then generators=(--generators $((GPUS - trainers > 0 ? GPUS - trainers : 1))); fi
    launch "$trainers" ppo.py --model "$OUT/sft-model" --data "$PROBLEMS" --eval_data "$TEST_DATA" --out "$OUT/ppo" \
        --device "$DEVICE" --resume $(layout "$trainers") "${generators[@]}" "${ppo_flags[@]}" &&
        python parallel.py merge "$OUT/ppo/checkpoints/policy" "$OUT/ppo-model"
}

run_evaluate() {
    local models=("$MODEL") name
    for name in sft ppo; do
        if [[ -f $OUT/$name-model/model.safetensors ]]; then models+=("$OUT/$name-model"); fi
    done
    python evaluate.py --model "${models[@]}" --data "$TEST_DATA" --out "$OUT/scores" --resume "${eval_flags[@]}"
}

pipeline() {
    stage model make_model
    stage data make_data
    stage sft run_sft
    stage evaluate run_evaluate
    stage ppo run_ppo
    stage evaluate run_evaluate
    echo "curves: $OUT/sft/curves.png, $OUT/ppo/curves.png; scores: $OUT/scores/scores.png"
}

# --- demos and tests ---

run_demo() {
    local name
    for name in "${@:-arrowlite actors kernels parallel engine evaluate sft ppo}"; do
        for name in $name; do stage "$name" demo "$name"; done
    done
}

demo() {        # that of parallel.py wants four processes on the CPU, or one on the GPU that there is
    if [[ $1 == parallel ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 parallel.py --tp 2 --pp 2
    else
        python "$1.py"
    fi
}

run_tests() {
    local select=(-m "not slow")
    if [[ "${1:-}" == all ]]; then
        select=()
        shift
    fi
    stage ruff python -m ruff check .
    stage tests python -m pytest "${select[@]}" "$@"
}

words=() names=" GPUS DEVICE MODEL OUT SFT_DATA RL_DATA TEST_DATA SFT_STEPS PPO_STEPS SFT_FLAGS PPO_FLAGS EVAL_FLAGS "
for word in "$@"; do
    if [[ ${words[0]:-} == test || ! $word =~ ^[A-Z_]+= ]]; then
        words+=("$word")
    elif [[ $names == *" ${word%%=*} "* ]]; then
        export "${word?}"
    else
        echo "run.sh: there is no setting ${word%%=*}; there are$names" >&2
        exit 2
    fi
done
set -- "${words[@]}"

case "${1:-pipeline}" in
    help | -h | --help) help ;;
    setup) stage setup setup test ;;
    test)
        shift
        stage setup setup test
        run_tests "$@"
        ;;
    demo)
        shift
        stage setup setup
        run_demo "$@"
        ;;
    pipeline | model | data | sft | ppo | evaluate)
        [[ $# -lt 2 ]] || { echo "run.sh: one stage at a time; '$2' is one too many" >&2; exit 2; }
        stage setup setup
        settle || exit
        case "${1:-pipeline}" in
            pipeline) pipeline ;;
            model) stage model make_model ;;
            data) stage data make_data ;;
            *) stage "$1" "run_$1" ;;
        esac
        ;;
    *)
        echo "run.sh: there is no stage '$1'" >&2
        help >&2
        exit 2
        ;;
esac
