#!/usr/bin/env bash
# Library:  Ray 2.60.0.
# Expected: a placement group that reserves cores leaves alone the workers that wait on them: its actors are about to run.
# Happens:  Ray keeps as many waiting workers as there are free cores, and to it reserved ones aren't free. Those that have
#           waited for over a second are ended at once, and the group's actors wait for new processes. If the actors come
#           within a few tenths of a second, they still get the old ones: it is a race.
# Seen:
#   workers that wait: 2
#   2 s after their cores were reserved: 0
#   with RAY_num_workers_soft_limit=2: 2
# Matters:  each trial of Ray Tune is a placement group: in one of six searches, workers that had loaded torch were lost.
# Guard:    RAY_num_workers_soft_limit is the number of slots:
#           `tests/search/test_cluster.py::test_trials_run_in_the_workers_that_have_loaded_torch`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check ray==2.60.0 psutil==7.2.2

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0
cat > reserve.py <<'EOF'
import os
import time

import psutil
import ray
from ray.util.placement_group import placement_group


def waiting():
    titles = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    return sum(title[0].startswith("ray::IDLE") for title in titles if title)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
while waiting() < 2:
    time.sleep(0.1)
time.sleep(2)
placement_group([{"CPU": 2}]).wait(30)
time.sleep(2)
print(waiting())
ray.shutdown()
EOF
after=$("$folder/venv/bin/python" -W ignore reserve.py 2> log.txt) || { tail -n 20 log.txt; exit 1; }
limited=$(RAY_num_workers_soft_limit=2 "$folder/venv/bin/python" -W ignore reserve.py 2> log.txt) || { tail -n 20 log.txt; exit 1; }
echo "workers that wait: 2"
echo "2 s after their cores were reserved: $after"
echo "with RAY_num_workers_soft_limit=2: $limited"
[ "$after" = 0 ] && [ "$limited" = 2 ]
