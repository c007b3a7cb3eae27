#!/usr/bin/env bash
# Makes .venv at the project's root with everything the project and its tests need. What is done is not done again.
#
#   bash launch/setup.sh                  the newest suitable of python3.11 ... python3
#   PYTHON=/path/to/python bash launch/setup.sh
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.done        # what the finished set-up was made from
started=$venv/.started   # there while pip is at work: an interrupted set-up leaves it behind

fail() {
    printf 'launch/setup.sh: %s\n' "$*" >&2
    exit 1
}

fingerprint() {
    # The interpreter and the place belong to it: without them the commands in .venv/bin do not start.
    cat pyproject.toml launch/constraints.txt && "$venv/bin/python" -c 'import sys; print(sys.version, sys.prefix)'
}

is_done() {
    [[ -x $venv/bin/lori && -f $stamp ]] || return 1
    local now
    now=$(fingerprint 2>/dev/null | sha256sum) && [[ $now == "$(<"$stamp")" ]]
}

suits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer; name one that is"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found ($(python3 --version 2>&1 || true)); install one, or name it: PYTHON=/path/to/python"
}

is_sound() {
    # Half made, its python is the one outside, into which pip would then install; moved, its commands name the old place.
    [[ ! -e $started ]] && suits "$venv/bin/python" && grep -qF "$PWD/$venv/" "$venv/bin/pip" &&
        "$venv/bin/python" -c 'import os, sys, pip; sys.exit(not os.path.samefile(sys.prefix, sys.argv[1]))' "$venv"
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv or no pip; install them (Debian, Ubuntu: apt-get install python3-venv python3-pip)"
    echo "A new environment, with $("$python" --version) ($(command -v "$python"))."
    # The lock is held by a file in there, so the folder itself stays.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    touch "$started"
    "$python" -m venv "$venv"
}

bring_up_to_date() {
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
        fail "no C++ compiler was found, which torch.compile needs; install one (Debian, Ubuntu: apt-get install g++)"
    is_sound 2>/dev/null || make_venv
    touch "$started"
    rm -f "$stamp"
    PIP_REQUIRE_VIRTUALENV=1 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e '.[dev]' ||
        fail "pip could not install the requirements; its reason stands above, and this command can be given again"
    fingerprint | sha256sum >"$stamp"
    rm -f "$started"
}

if is_done; then
    exit 0
fi
command -v flock >/dev/null || fail "flock is missing; install it (Debian, Ubuntu: apt-get install util-linux)"
mkdir -p "$venv"
exec 9>"$venv/.lock"
flock --nonblock 9 || {
    echo "Another set-up is at work; waiting for it."
    flock 9
}
if ! is_done; then
    echo "Setting up $venv (once; several minutes, most of them for downloads)."
    bring_up_to_date
    echo "Done: $venv/bin/lori is there."
fi
