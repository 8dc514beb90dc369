#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0, in a notebook (ipykernel 7.4.0, run by nbclient 0.11.0).
# Expected: with verbose=0 a search shows nothing, and leaves alone what the cell has printed before.
# Happens:  in a notebook Tune makes its own reporter whatever verbose says, and this one clears the cell's output as it is
#           made. With verbose=0 it then shows nothing in its place: what a program has said before the search is gone.
#           With the reporter for terminals, CLIReporter(), nothing is cleared.
# Seen:
#   by default: ['after']
#   with CLIReporter: ['before', 'after']
# Matters:  what the audit of the data has found is printed before the search begins, and a user in a notebook never saw it.
# Guard:    the search gives Tune CLIReporter(): `tests/test_api.py::test_a_notebook`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    'ray[tune]==2.60.0' nbclient==0.11.0 ipykernel==7.4.0 numpy==2.4.6

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0 JUPYTER_DATA_DIR="$folder/jupyter"
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import nbformat
from nbclient import NotebookClient

BEGIN = """
import os
import ray
from ray import tune

class Trial(tune.Trainable):
    def step(self):
        return {"done": True}

    def save_checkpoint(self, folder):
        pass

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
"""
SEARCH = """
print("before")
config = tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0%s)
tune.Tuner(tune.with_resources(Trial, {"cpu": 1}), run_config=config).fit()
print("after")
"""
sources = [BEGIN, SEARCH % "", SEARCH % ", progress_reporter=tune.CLIReporter()", "ray.shutdown()"]
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
NotebookClient(book, timeout=120, kernel_name="python3").execute()


def printed(cell):
    texts = [output["text"] for output in cell.outputs if output.get("name") == "stdout"]
    return [line for line in "".join(texts).splitlines() if line in ("before", "after")]


by_default, with_reporter = printed(book.cells[1]), printed(book.cells[2])
print("by default:", by_default)
print("with CLIReporter:", with_reporter)
assert with_reporter == ["before", "after"]
assert by_default == ["after"], "Tune leaves the cell's output alone now"
EOF
