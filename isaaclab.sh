#!/usr/bin/env bash
# Isaac Lab's command line in this project's own environment, which the first call sets up:
#
#   ./isaaclab.sh -p scripts/train.py --task Isaac-Ant-v0 --algo m3po
#   ./isaaclab.sh -p -m pytest
#   ./isaaclab.sh train --rl_library m3po --task Isaac-Ant
#   ./isaaclab.sh --install                                    (sets it up, and no more)
#
# With ISAACLAB_PATH set, the Isaac Lab checkout in that folder is used instead, with its own environment, into which
# the first call installs this project (pip install --no-deps --editable).
set -euo pipefail

root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)"
venv="$root/.venv"
# "incomplete" while packages are being installed, then the fingerprint of what was installed
state="$venv/.m3po"
# the checkout into which this project was installed last, and the fingerprint at that time
checkout_state="$root/.isaaclab_path"

say() { printf '[m3po] %s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 2
}

# step LABEL COMMAND...: run a command, say what it does and how long it took
step() {
    local label="$1" start=$SECONDS
    shift
    say "$label ..."
    if ! "$@" >&2; then
        say "error: $label failed; the same command tries again"
        exit 1
    fi
    say "$label took $((SECONDS - start)) s"
}

# Changes with the lock, the entry points, the Python version, and the place of this folder, to which it is linked.
fingerprint() {
    { printf '%s\n' "$root" && cat "$root"/{requirements.txt,pyproject.toml,.python-version}; } | sha256sum
}

is_ready() { [[ -x "$venv/bin/python" && -f "$state" && "$(<"$state")" == "$(fingerprint)" ]]; }

is_python_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' &>/dev/null; }

# Print a Python 3.12. Each candidate is run, because the shims of version managers exist without working, and names the
# interpreter behind it, because it may be the one of the environment about to be replaced.
find_python() {
    local candidate
    for candidate in python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        if is_python_312 "$candidate"; then
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
}

has_uv() { uv --version &>/dev/null; }

# Called with a lock on descriptor 9, so that of several first calls one installs and the others wait.
bootstrap() {
    local python start=$SECONDS
    if ! flock --nonblock 9; then
        say "another call is setting up the environment, waiting for it ..."
        flock 9
    fi
    if is_ready; then return; fi
    cd "$root"
    python="$(find_python)"
    if [[ -z "$python" ]] && ! has_uv; then
        fail "neither Python 3.12 nor uv was found: install one of them (https://docs.astral.sh/uv/) and run this again"
    fi
    # an interrupted installation leaves packages that only look complete
    if is_python_312 "$venv/bin/python" && [[ "$(cat "$state" 2>/dev/null)" != incomplete ]]; then
        say "updating $venv"
    else
        say "setting up $venv: once, a few minutes, about 8 GB"
        rm -rf "$venv"
    fi
    if has_uv; then
        if [[ ! -e "$venv" ]]; then
            step "creating the environment" uv venv --quiet --python "${python:-$(<.python-version)}" "$venv"
        fi
        echo incomplete >"$state"
        step "installing the locked packages" \
            uv pip sync --compile-bytecode --python "$venv/bin/python" --require-hashes requirements.txt
        step "installing m3po" \
            uv pip install --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
    else
        local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --no-input)
        step "creating the environment" "$python" -m venv "$venv"
        echo incomplete >"$state"
        # the lock is complete, and some packages of it declare older pins than those that work together
        step "installing the locked packages" "${pip[@]}" --no-deps --require-hashes --requirement requirements.txt
        step "installing m3po" "${pip[@]}" --no-deps --no-build-isolation --editable .
    fi
    step "building the embedded assets" \
        "$venv/bin/python" -c 'from isaaclab_m3po import assets; print(assets.build_cache())'
    fingerprint >"$state"
    say "ready after $((SECONDS - start)) s; the first simulation also compiles its kernels, about 30 s, once"
}

# Hand over to the Isaac Lab checkout that ISAACLAB_PATH names.
run_checkout() {
    local checkout installed
    checkout="$(readlink -f -- "$ISAACLAB_PATH" || true)"
    if [[ ! -x "$checkout/isaaclab.sh" || "$checkout" == "$root" ]]; then
        fail "ISAACLAB_PATH=$ISAACLAB_PATH is not an Isaac Lab checkout: it has no isaaclab.sh of Isaac Lab's"
    fi
    installed="$checkout $(fingerprint)"
    if [[ "$(cat "$checkout_state" 2>/dev/null)" != "$installed" ]]; then
        step "installing m3po into the environment of $checkout" \
            "$checkout/isaaclab.sh" -p -m pip install --no-deps --editable "$root"
        printf '%s\n' "$installed" >"$checkout_state"
    fi
    exec "$checkout/isaaclab.sh" "$@"
}

# more threads only contend with the physics, and slow the updates down up to tenfold
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ -n "${ISAACLAB_PATH:-}" ]]; then run_checkout "$@"; fi
if ! is_ready; then
    (bootstrap) 9<"$root/requirements.txt"
fi

if [[ "${1:-}" == --install || "${1:-}" == -i ]]; then
    say "all packages of the lock are installed in $venv"
    exit 0
fi
# Isaac Lab's command line takes its interpreter from here, not from an environment the user happens to be in
export VIRTUAL_ENV="$venv"
if [[ "${1:-}" == -p && $# -gt 1 ]]; then
    # As Isaac Lab's own -p: same interpreter, variables and folder. But that runs Python as a child and kills it a
    # quarter of a second after Ctrl-C, before it can write a checkpoint, and passes no other signal on.
    exec "$venv/bin/python" "${@:2}"
fi
exec "$venv/bin/python" -P -m isaaclab "$@"
