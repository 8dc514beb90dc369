#!/bin/bash
# Start:   sbatch deploy/slurm.sh --data /shared/chest_xrays --storage /shared/results --name xray   (in the checkout)
# Follow:  tail -f finetune-search-JOBID.log       Stop: scancel JOBID
# Resume:  sbatch deploy/slurm.sh --resume --storage /shared/results --name xray
#
# Share:   MPS=1 sbatch deploy/slurm.sh --gpus-per-trial 0.5 ...   (trials on one GPU at the same time, by NVIDIA's MPS, instead of in turns)
#
# The checkout and PYTHON (default .venv/bin/python in it) must be readable on all nodes. Adapt the next lines to your cluster.
#SBATCH --job-name=finetune-search
#SBATCH --output=finetune-search-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

python=${PYTHON:-$PWD/.venv/bin/python}
ray=$(dirname "$python")/ray
# Two jobs may share a node: each has ports of its own, and lets Ray choose free ports for workers instead of its fixed range.
port=$((20000 + 2 * (SLURM_JOB_ID % 6000)))
free=(--min-worker-port=0 --max-worker-port=0)
head_free=("${free[@]}")
if "$python" -c 'import grpc' 2> /dev/null; then # without grpc Ray has no client server, and refuses the option
    head_free+=(--ray-client-server-port=$((port + 1)))
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
gpus=${SLURM_GPUS_ON_NODE:-0}
export RAY_USAGE_STATS_ENABLED=0
# Other users of these nodes can reach Ray's ports, and whoever can talk to Ray can run code: only this job knows the token (Ray 2.52 and later).
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Ray's head, Ray on the other nodes, and the search are steps of their own; the first two run until this script ends them.
steps=()
# Since Slurm 22.05 a step has one core of its job's unless it asks for them.
step=(--overlap --nodes=1 --ntasks=1 "--cpus-per-task=$SLURM_CPUS_PER_TASK")
trap 'kill "${steps[@]}" 2> /dev/null || true; wait; rm -rf "${CUDA_MPS_PIPE_DIRECTORY:-}"' EXIT

if [[ ${MPS:-} == 1 ]]; then # where its daemon doesn't start, trials take turns
    export CUDA_MPS_PIPE_DIRECTORY=${TMPDIR:-/tmp}/mps-$SLURM_JOB_ID
    export CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    for node in "${nodes[@]}"; do
        # shellcheck disable=SC2016 # the node expands it
        srun "${step[@]}" --nodelist="$node" \
            bash -c 'mkdir -p "$CUDA_MPS_LOG_DIRECTORY" && exec nvidia-cuda-mps-control -f' &
        steps+=($!)
    done
fi
srun "${step[@]}" --nodelist="$head" "$ray" start --block --head --include-dashboard=false \
    --node-ip-address="$address" --port="$port" "${head_free[@]}" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" &
steps+=($!)
for node in "${nodes[@]:1}"; do
    srun "${step[@]}" --nodelist="$node" "$ray" start --block --address="$address:$port" \
        "${free[@]}" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" &
    steps+=($!)
done

# Wait until all nodes have joined, at most two minutes; the search then starts with those that have.
export RAY_ADDRESS=$address:$port
"$python" - "${#nodes[@]}" << 'END'
import sys, time, ray

until = time.monotonic() + 120
while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        if time.monotonic() > until:
            raise
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]) and time.monotonic() < until:
    time.sleep(1)
END

# A job that Slurm has requeued goes on where it was.
if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && " $* " != *" --resume "* ]]; then
    storage=results name=
    for ((place = 1; place <= $#; place++)); do
        next=$((place + 1))
        case ${!place} in
            --storage) storage=${!next} ;;
            --storage=*) storage=${!place#*=} ;;
            --name) name=${!next} ;;
            --name=*) name=${!place#*=} ;;
        esac
    done
    there='import sys; from tuning.record.storage import stored; sys.exit(stored([sys.argv[1]]) == [None])'
    plan=$storage/$name/plan.yaml
    if [[ -n $name ]] && { [[ -e $plan ]] || { [[ $storage == *://* ]] && "$python" -c "$there" "$plan"; }; }; then
        set -- --resume --storage "$storage" --name "$name"
    fi
fi

# The driver runs on this, the first node. It gets Slurm's SIGTERM, two minutes before the time limit, so that the run can be resumed.
"$python" tuning/run_search.py "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ended the first wait, not the driver
    status=0
    wait "$driver" || status=$?
done
exit "$status"
