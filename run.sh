#!/usr/bin/env bash
# The whole project by one command. `bash run.sh help` lists the stages.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
    cat <<'TEXT'
usage: bash run.sh [STAGE]

  (none)      the pipeline: today, the demo of every file that exists
  arrowlite   the demo of arrowlite.py: columnar data, and how fast it is
  actors      the demo of actors.py: a small Ray, and how fast it is
  kernels     the demo of kernels.py: every kernel against its twin; on a GPU, how fast they are
  parallel    the demo of parallel.py: a tiny Qwen3 over tp=2 x pp=2 processes against one; on a GPU, the speed
  engine      the demo of engine.py: a paged generator; on a GPU, how fast it is
  evaluate    the demo of evaluate.py: problems, answers, grades, scores
  sft         the demo of sft.py: a tiny model learns sums, then preferences
  ppo         the demo of ppo.py: a tiny model learns from its own samples
  test        ruff and the test suite; `test all` adds the long checks, other words go to pytest (`test -k jsonl`)
  setup       only install what the other stages need
  help        this text

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

# --- stages ---

stage() {       # stage NAME COMMAND...: run it, and name it if it fails
    local name=$1
    shift
    echo "=== $name ==="
    "$@" || { local code=$?; echo "run.sh: stage '$name' failed (exit $code)" >&2; exit "$code"; }
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

run_parallel() {        # four processes on the CPU, or one on the GPU that there is
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        python parallel.py
    else
        OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 parallel.py --tp 2 --pp 2
    fi
}

case "${1:-pipeline}" in
    help | -h | --help) help ;;
    setup) stage setup setup test ;;
    test)
        shift
        stage setup setup test
        run_tests "$@"
        ;;
    arrowlite | actors | kernels | engine | evaluate | sft | ppo)
        stage setup setup
        stage "$1" python "$1.py"
        ;;
    parallel)
        stage setup setup
        stage parallel run_parallel
        ;;
    pipeline)
        stage setup setup
        stage arrowlite python arrowlite.py
        stage actors python actors.py
        stage kernels python kernels.py
        stage parallel run_parallel
        stage engine python engine.py
        stage evaluate python evaluate.py
        stage sft python sft.py
        stage ppo python ppo.py
        ;;
    *)
        echo "run.sh: there is no stage '$1'" >&2
        help >&2
        exit 2
        ;;
esac
