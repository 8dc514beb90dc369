#!/usr/bin/env bash
# Library:  Ray 2.60.0 (without the extra `default`).
# Expected: with RAY_USAGE_STATS_ENABLED=0 and include_dashboard=False a local Ray asks nothing of any network.
# Happens:  its dashboard's process starts all the same, and before it looks whether usage statistics are on it finds out
#           which cloud this is: it asks 169.254.169.254, and looks metadata.google.internal up.
# Seen:
#   169.254.169.254 asked: yes, a name looked up: yes
# Matters:  on a hospital's machine a tool that asks nothing of any network must be that: such requests are reported, and
#           where nothing answers each takes a second of the process.
# Guard:    a search on one machine doesn't start that process:
#           `tests/test_end_to_end.py::test_the_default_search_on_generated_radiographs`, where strace is installed.
# Needs strace.
set -euo pipefail
command -v strace > /dev/null || { echo "strace is needed"; exit 3; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check ray==2.60.0

cat > "$folder/local.py" <<'EOF'
import time

import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
time.sleep(10)
ray.shutdown()
EOF
HOME=$folder RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 \
  strace -f -qqq -e signal=none -e trace=connect -o "$folder/trace.txt" "$folder/venv/bin/python" "$folder/local.py"
said() { if grep -q "$1" "$folder/trace.txt"; then echo yes; else echo no; fi; }
asked=$(said 'inet_addr("169.254.169.254")')
looked=$(said 'htons(53)')
echo "169.254.169.254 asked: $asked, a name looked up: $looked"
[ "$asked" = yes ] && [ "$looked" = yes ]
