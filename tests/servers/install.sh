#!/bin/sh
# Makes .venv-moto in the repository's root: moto's S3 server in an environment of its own, since its pins and ours differ.
# Safe to run again, and by two processes at once: the environment is built aside and moved into place when it is whole.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv="$root/.venv-moto"
wanted="moto[server]>=5.1,<6"
[ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$wanted" ] && exit 0
exec 9>"$root/.venv-moto.lock"
flock 9
[ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$wanted" ] && exit 0
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wanted"
echo "$wanted" > "$venv/installed"
