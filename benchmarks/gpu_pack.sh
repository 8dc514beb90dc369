#!/bin/bash
# Pack what `benchmarks/gpu.py` needs on a machine with a GPU that has PyTorch, torchvision, timm, pandas, PyArrow, SciPy and
# scikit-learn, but no network: wheels of the rest, and Ray without what a search doesn't use (under 60 MiB in all).
#
#   bash benchmarks/gpu_pack.sh 3.12 build/gpu_pack        here, with the Python version of that machine
#   bash build/gpu_pack/run.sh OUT                         there, in a copy of the checkout; more arguments go to gpu.py
set -euo pipefail

version=${1:?give the Python version of the machine with the GPU, such as 3.12} pack=${2:?give a folder}
python=${PYTHON:-.venv/bin/python}
rm -rf "$pack"
mkdir -p "$pack"
download() {
    local platforms=()
    for minor in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$1" "${@:2}"
}
here() { "$python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }
names=(pydantic pydantic-core typing-inspection annotated-types typing-extensions tyro docstring-parser optuna colorlog
    sqlalchemy alembic mako jsonschema jsonschema-specifications referencing rpds-py tensorboardx threadpoolctl msgpack)
wheels=()
for name in "${names[@]}"; do wheels+=("$name==$(here "$name")"); done
download "$pack/wheels" "${wheels[@]}"

# Ray: dashboard, Java, reinforcement learning, serving and tests are most of it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
download "$work" "ray==$(here ray)"
"$python" -m zipfile -e "$work"/ray-*.whl "$work/site"
(
    cd "$work/site"
    rm -rf ray/rllib ray/serve ray/llm ray/jars ray/cpp ray/dashboard/client ray/tests ray/tune/examples ray/train/examples ray-*.data
    find . -name '*.pyi' -delete
    chmod +x ray/core/src/ray/raylet/raylet ray/core/src/ray/gcs/gcs_server
)
tar --create --xz --file "$pack/ray.tar.xz" --directory "$work/site" .

cat > "$pack/run.sh" << 'END'
#!/bin/bash
# Run benchmarks/gpu.py with what lies beside this file. The first argument is the folder of its results.
set -euo pipefail
pack=$(cd "$(dirname "$0")" && pwd) out=${1:?give the folder of the results} site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$pack"/wheels/*.whl
tar --extract --xz --file "$pack/ray.tar.xz" --directory "$site"
PYTHONPATH=$site python3 benchmarks/gpu.py --out "$out" "${@:2}"
END
du -sh "$pack"
