#!/bin/bash
# A study in a Slurm job: Ray's head on the first machine, its workers on the others, the study on top. From the
# repository's root, with Equipoise in .venv and everything below on file systems that all machines see:
#
#   sbatch clusters/slurm.sh studies/stability_sweep.py --store /scratch/cohort.zarr --gpus-per-worker .5
#
# Results lie under $EQUIPOISE_RESULTS (./results) in a folder of the study's and the job's name. Five minutes before
# its time is over the job ends the study and puts itself into the queue again, where it goes on; so it does when a
# machine fails and Slurm requeues it. What a run did since its last checkpoint is done again. EQUIPOISE_INTERFACE
# names the network between machines (ib0, say) where it is not that of the default route.
#
# `tests/cluster/test_other_clusters.py` runs it with stand-ins for Slurm's commands and Ray's; it has not run on a
# Slurm.
#
#SBATCH --job-name=equipoise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=equipoise-%j.log
# Appended to, since a job that was requeued writes to it again.
#SBATCH --open-mode=append
#SBATCH --requeue
# To this script alone, five minutes ahead.
#SBATCH --signal=B:USR1@300
set -euo pipefail

script=${1:?give a study, such as studies/stability_sweep.py}
shift
job=${SLURM_JOB_ID:?to be started by sbatch}
results=${EQUIPOISE_RESULTS:-$PWD/results}
name=$(basename "$script" .py)-$job
PATH=$PWD/.venv/bin:$PATH

# Whoever has the token may run code as this user. It is made for the job, on a file system that its machines share.
folder=$PWD/.equipoise-$job
(umask 077 && mkdir -p "$folder" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$folder/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0

# Several jobs may share a machine, and several users its /tmp: ports and folders are the job's own. Ray's folder is
# short, since the paths of its sockets may have 107 characters.
port=$((20000 + job % 4000 * 10))
own=(--temp-dir="/tmp/ray-$job" --node-manager-port=$((port + 2)) --object-manager-port=$((port + 3))
  --dashboard-agent-listen-port=$((port + 4)) --runtime-env-agent-port=$((port + 5)) --metrics-export-port=$((port + 6))
  --min-worker-port=0 --max-worker-port=0 --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats --block)

# (No pipe below is left before its end: with `pipefail` what still writes to it would fail the job.)
# Gloo and NCCL are told their interface: a host name may resolve to 127.0.1.1, or to a network that is slow.
interface=${EQUIPOISE_INTERFACE:-$(ip -4 route show default | awk 'NR == 1 {print $5}')}
address=$(ip -4 -o address show dev "$interface" | awk 'NR == 1 {sub("/.*", "", $4); print $4}')
export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
# A worker whose head is gone ends its Ray after 20 s, and with it its hold on the runs' records.
export RAY_gcs_rpc_server_reconnect_timeout_s=20

study='' rays=()
clean_up() {
  trap - EXIT USR1 TERM
  # Each `srun` stands for its machines' Ray (--block) and takes it along; no other job's Ray is touched.
  for process in $study "${rays[@]}"; do kill "$process" 2> /dev/null || true; done
  rm -rf "$folder"
}
requeue() {
  echo "time is nearly over: the study goes on when the job runs again"
  clean_up
  scontrol requeue "$job"
  exit 0
}
trap clean_up EXIT
trap requeue USR1
trap 'exit 143' TERM

# This script runs on the first machine; the dashboard, which Ray Train asks about its runs, listens on its loopback.
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | awk 'NR == 1')
srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" ray start --head --node-ip-address="$address" --port="$port" \
  --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 7)) "${own[@]}" &
rays+=($!)
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  until ray health-check --address "$address:$port" > /dev/null 2>&1; do
    kill -0 "${rays[0]}"
    sleep 2
  done
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$first" ray start --address="$address:$port" \
    "${own[@]}" &
  rays+=($!)
fi
until [ "$(ray status --address "$address:$port" 2> /dev/null | grep -c ' node_')" -ge "$SLURM_JOB_NUM_NODES" ]; do
  kill -0 "${rays[@]}"
  sleep 2
done

# The study's own folder says whether this job has begun it before.
resume=()
if [ -e "$results/$name/study.json" ]; then resume=(--resume); fi
python "$script" --address "$address:$port" --results "$results" --name "$name" "${resume[@]}" "$@" &
study=$!
# A signal ends `wait` early; its trap has exited then.
wait "$study"
