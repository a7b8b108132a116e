#!/usr/bin/env bash
# The whole project by one command. `bash run.sh help` lists the stages.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
usage: bash run.sh [STAGE] [NAME=VALUE ...]

  (none)      the pipeline: model, data, sft, ppo, evaluate. What is there is not done again, what was interrupted goes on
  model       find the base model; on a CPU, make a tiny one
  data        find or write what is learned from, and what is asked in the end
  sft, ppo    supervised fine-tuning; then reinforcement learning: half of the GPUs train, the others generate
  evaluate    ask all models there are, and print one table of their scores
  demo [F]    the demo of one of the eight files, or of all: bash run.sh demo engine
  test        ruff and the test suite; `test gpu`: what needs a GPU; `test all`; other words go to pytest (`test -k jsonl`)
  setup       only install what the other stages need, into the active virtual environment or else into .venv

  GPUS=8      how many to use; by default all. With DEVICE=cpu, processes in their place (2)
  DEVICE=cpu  the default where there is no GPU; then a tiny model learns to add, unless MODEL names another
  MODEL=      a model directory or hub id                 (Qwen/Qwen3-0.6B-Base)
  SFT_DATA=   problems with solutions: a file, a hub id   (NotASI/NuminaMath-CoT-Small-Hard-200k)
  RL_DATA=    problems with answers                       (zwhe99/DeepMath-103K)
  TEST_DATA=  those that are asked in the end             (HuggingFaceH4/MATH-500)
  OUT=        where everything goes; another model or other data want another one     (runs/gpu or runs/cpu)
  TP=1 PP=1   parts of each layer, stages of the pipeline: TP x PP GPUS have a copy of what is trained; the rest is dp
  SFT_STEPS=, PPO_STEPS=, SFT_FLAGS=, PPO_FLAGS=, EVAL_FLAGS=     fewer steps; further flags: PPO_FLAGS="--advantage grpo"
TEXT
}

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

stage() {       # stage NAME COMMAND...: run it, and name it if it fails
    echo "=== $1 ==="
    "${@:2}" || { local code=$?; echo "run.sh: stage '$1' failed (exit $code)" >&2; exit "$code"; }
}

setup() {       # setup [test]: what pyproject.toml asks for, unless all of it can be imported
    if [[ -z ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]]; then
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            for python in python3 python3.13 python3.12 python3.11 python3.10 ''; do
                "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
            done
            [[ $python ]] || fail "no Python 3.10 or newer was found; install one first"
            "$python" -m venv --clear .venv || fail "python -m venv failed; on Debian: apt install python3-venv"
        fi
        export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
    fi
    local how=(--no-compile)                # Python compiles what it imports; pip would compile all there is, for a minute
    local needed=(torch triton transformers math_verify numpy matplotlib cloudpickle)
    [[ ${1:-} ]] && how=() needed+=(pytest ruff pyarrow polars duckdb datasets pandas ray)
    python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "${needed[@]}" && return
    echo "run.sh: installing"; python -m pip install --quiet --disable-pip-version-check "${how[@]}" -e ".${1:+[$1]}"
}

# --- the pipeline: what runs where; a model is there when its weights are, which come last and whole ---

settle() {      # devices and sizes, from what the machine has and what the caller said
    local gpus
    gpus=$([[ ${DEVICE:-} == cpu ]] && echo 0 || python -c 'import torch; print(torch.cuda.device_count())')
    DEVICE=${DEVICE:-$([[ $gpus -gt 0 ]] && echo cuda || echo cpu)}
    GPUS=${GPUS:-$([[ $DEVICE == cuda ]] && echo "$gpus" || echo 2)}
    [[ $DEVICE =~ ^(cuda|cpu)$ && $GPUS =~ ^[1-9][0-9]*$ && ($DEVICE == cpu || $GPUS -le $gpus) ]] ||
        fail "DEVICE is cuda or cpu, GPUS at least 1 and at most the $gpus there are; got $DEVICE, $GPUS"
    TP=${TP:-1} PP=${PP:-1}
    [[ $TP$PP =~ ^[1-9]+$ && $((TP * PP)) -le $GPUS ]] || fail "TP=$TP x PP=$PP should be from 1 to the $GPUS of GPUS"
    local copy=$((TP * PP))                                 # GPUs that a copy of the model takes
    learners=$((GPUS / copy * copy))                        # ranks of sft.py; below of ppo.py, whose others generate
    trainers=$((GPUS / 2 >= copy ? GPUS / 2 / copy * copy : copy))
    layout=(--device "$DEVICE" --tp "$TP" --pp "$PP" --resume)
    sft_flags=() ppo_flags=() eval_flags=(--n 4)            # what is not said here has the files' own defaults
    OUT=${OUT:-runs/${DEVICE/cuda/gpu}} sums=
    mkdir -p "$OUT"
    if [[ $DEVICE == cuda ]]; then
        export CUDA_VISIBLE_DEVICES="$(cut -d, -f "1-$GPUS" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}")"
    else
        export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=      # processes share the cores
        ppo_flags=(--generators $((GPUS > trainers ? GPUS - trainers : 1)))
        eval_flags+=(--device cpu)
    fi
    if [[ $DEVICE == cpu && -z ${MODEL:-} ]]; then          # a tiny model that learns to add
        [[ -z ${SFT_DATA:-}${RL_DATA:-}${TEST_DATA:-} ]] || fail "without a GPU, say MODEL= to use data of your own"
        sums=yes MODEL=$OUT/base SFT_DATA=$OUT/sums.jsonl RL_DATA=$OUT/sums.jsonl TEST_DATA=$OUT/test.jsonl
        sft_flags=(--batch 16 --steps 600 --lr 3e-3 --min_lr 3e-4 --warmup 0.05 --max_tokens 4096 --log_every 100)
        ppo_flags+=(--batch 128 --samples 1 --steps 18 --max_prompt 128 --max_response 40 --minibatches 2 --lr 2e-4
                    --critic_lr 1e-3 --critic_warmup 0 --warmup 5 --eval_every 9 --log_every 3 --graders 1)
        eval_flags+=(--temperature 1 --top_p 1 --max_tokens 40)
    fi
    MODEL=${MODEL:-Qwen/Qwen3-0.6B-Base} SFT_DATA=${SFT_DATA:-NotASI/NuminaMath-CoT-Small-Hard-200k}
    RL_DATA=${RL_DATA:-zwhe99/DeepMath-103K} TEST_DATA=${TEST_DATA:-HuggingFaceH4/MATH-500}
    sft_flags+=(${SFT_STEPS:+--steps "$SFT_STEPS"} ${SFT_FLAGS:-})
    ppo_flags+=(${PPO_STEPS:+--steps "$PPO_STEPS"} ${PPO_FLAGS:-})
    eval_flags+=(${EVAL_FLAGS:-})
}

launch() {      # launch PROCESSES FILE FLAGS...
    if [[ $1 == 1 ]]; then python "${@:2}"; else torchrun --standalone --nproc-per-node "$@"; fi
}

run_model() {
    [[ ! $sums || -f $MODEL/tokenizer.json ]] ||
        python -c 'import parallel as p, sys; p.tiny_model(sys.argv[1], vocab_size=264, hidden_size=64, num_hidden_layers=2)' \
            "$MODEL" || return 1
    [[ -d $MODEL ]] || python -c 'import parallel, sys; parallel.local_folder(sys.argv[1])' "$MODEL" 2>"$OUT/error" ||
        fail "$(tail -n 1 "$OUT/error"); where the hub can be reached: hf download $MODEL --local-dir base; then here: bash run.sh MODEL=base"
}

run_data() {
    [[ ! $sums || -f $SFT_DATA ]] || python evaluate.py arithmetic --n 10000 --boxed 0.5 --out "$SFT_DATA" || return 1
    [[ ! $sums || -f $TEST_DATA ]] ||
        python evaluate.py arithmetic --n 200 --seed 1 --held_out --out "$TEST_DATA" || return 1
    local name; local -A split=([SFT_DATA]=train [RL_DATA]=train [TEST_DATA]=test)
    for name in SFT_DATA RL_DATA TEST_DATA; do
        [[ -e ${!name} ]] ||
            python -c 'import evaluate, sys; next(evaluate.read_rows(*sys.argv[1:]))' "${!name}" ${split[$name]} 2>"$OUT/error" ||
            fail "$(tail -n 1 "$OUT/error"); where the hub can be reached: hf download ${!name} --repo-type dataset --local-dir data;" \
                "then here: bash run.sh $name=data (a folder, or a file of it: .jsonl, .arrow, .parquet)"
    done
    [[ -f $OUT/sft.arrow ]] || python sft.py prepare --data "$SFT_DATA" --model "$MODEL" --out "$OUT/sft.arrow"
}

there() { [[ -f $OUT/$1/model/model.safetensors ]]; }
run_sft() {
    there sft && { echo "$OUT/sft/model is there"; return; }
    [[ -f $OUT/sft.arrow ]] || fail "there is no $OUT/sft.arrow: run the stage 'data' first"
    launch "$learners" sft.py --model "$MODEL" --data "$OUT/sft.arrow" --out "$OUT/sft" "${layout[@]}" "${sft_flags[@]}"
}

run_ppo() {
    there ppo && { echo "$OUT/ppo/model is there"; return; }
    there sft || fail "there is no $OUT/sft/model: run the stage 'sft' first"
    launch "$trainers" ppo.py --model "$OUT/sft/model" --data "$RL_DATA" --out "$OUT/ppo" "${layout[@]}" "${ppo_flags[@]}"
}

run_evaluate() {
    local models=("$MODEL")
    if there sft; then models+=("$OUT/sft/model"); fi
    if there ppo; then models+=("$OUT/ppo/model"); fi
    python evaluate.py --model "${models[@]}" --data "$TEST_DATA" --out "$OUT/scores" --resume "${eval_flags[@]}"
}

# --- a stage, and settings ---
words=() names=" GPUS DEVICE MODEL OUT SFT_DATA RL_DATA TEST_DATA TP PP SFT_STEPS PPO_STEPS SFT_FLAGS PPO_FLAGS EVAL_FLAGS "
for word in "$@"; do
    if [[ ${words[0]:-} == test || ! $word =~ ^[A-Z_]+= ]]; then
        words+=("$word")
    elif [[ $names == *" ${word%%=*} "* ]]; then
        export "${word?}"
    else
        fail "there is no setting ${word%%=*}; there are$names"
    fi
done
name=${words[0]:-pipeline} rest=("${words[@]:1}")
case $name in
    help | -h | --help) help ;;
    setup) stage setup setup test ;;
    test)
        stage setup setup test
        case ${rest[0]:-} in
            gpu) rest=(-m gpu "${rest[@]:1}") ;;
            all) rest=("${rest[@]:1}") ;;
            *) rest=(-m "not slow and not gpu" "${rest[@]}") ;;
        esac
        stage ruff python -m ruff check . && stage tests python -m pytest "${rest[@]}"
        ;;
    demo)
        stage setup setup
        for file in ${rest[0]:-arrowlite actors kernels parallel engine evaluate sft ppo}; do stage "$file" python "$file.py"; done
        ;;
    pipeline | model | data | sft | ppo | evaluate)
        [[ ! ${rest[0]:-} ]] || fail "one stage at a time; '${rest[0]}' is one too many"
        stage setup setup
        settle
        for part in ${name/pipeline/model data sft ppo evaluate}; do stage "$part" "run_$part"; done
        ;;
    *) fail "there is no stage '$name'; bash run.sh help lists them" ;;
esac
