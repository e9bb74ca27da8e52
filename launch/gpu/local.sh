#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#
#   local.sh --config configs/X.py --workdir DIR [--processes N] [flag...] [-- flag of the train command...]
#
# One process drives all GPUs. The same workdir resumes a run. What follows "--" goes to the train command:
# --config.a.b=value, --preflight, --allow-changes=NAME. Relative paths begin at the root of this clone.
#   --processes N   so many processes, which share the GPUs evenly and talk as several hosts would: 1.
#                   Their output is in DIR/logs/process-N.log. Without GPUs each has one CPU device: a run of
#                   several hosts in small, with --config.mesh.data=N
#   --port P        where process 0 listens for the others: 29400
#   --cache DIR     folder for compiled programs: a restart does not compile again
#   --dry-run       print what would be started and start nothing
#
# From the environment: NGRPO_CONFIG, NGRPO_WORKDIR, NGRPO_CACHE_DIR, NGRPO_PYTHON (.venv/bin/python of this clone),
# CUDA_VISIBLE_DEVICES to leave GPUs out, and NGRPO_END_SECONDS (60: how long the other processes may take to end
# after one has failed).

# shellcheck source-path=SCRIPTDIR
# shellcheck source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # set to nothing: none of them
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | grep -c . || true
  else
    echo 0
  fi
}

# Starts process $1 of $processes with its share of the GPUs and its log.
start_process() {
  local words=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  local share=$((gpus / processes))
  ((share == 0)) || words+=("JAX_LOCAL_DEVICE_IDS=$(seq -s , $(($1 * share)) $((($1 + 1) * share - 1)))")
  show "${words[@]}" "${command[@]}"
  [[ $DRY_RUN == false ]] || return 0
  "${words[@]}" "${command[@]}" >>"$NGRPO_WORKDIR/logs/process-$1.log" 2>&1 </dev/null &
  pids+=($!)
}

# Names each process that fails, and ends with the status of the first; with 2 (a mistake of the user) where any
# process has it. jax ends the others within 45 seconds; what is left after a minute is killed.
wait_for_all() {
  local status=0 process ended deadline=""
  trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT
  # The processes agree on the step after which all of them stop, and write a checkpoint.
  trap 'note "stopping after this step"; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
  while ((${#pids[@]} > 0)); do
    sleep 0.3 || true # Ctrl-C ends the sleep too
    for process in "${!pids[@]}"; do
      ! kill -0 "${pids[process]}" 2>/dev/null || continue
      ended=0
      wait "${pids[process]}" || ended=$?
      unset "pids[process]"
      ((ended != 0)) || continue
      note "error: process $process ended with status $ended; see $NGRPO_WORKDIR/logs/process-$process.log"
      ((status != 0 && ended != 2)) || status=$ended
      deadline=${deadline:-$((SECONDS + ${NGRPO_END_SECONDS:-60}))}
    done
    [[ -z $deadline ]] || ((SECONDS < deadline)) || kill -KILL "${pids[@]}" 2>/dev/null || true
  done
  exit "$status"
}

split_flags "$@"
set -- "${ARGS[@]}"
processes=1 port=29400 pids=()
while (($#)); do
  case $1 in
    --help | -h) show_help ;;
    --dry-run) DRY_RUN=true && shift && continue ;;
    --config | --workdir | --processes | --port | --cache) need_value "$@" ;;
    *) unknown_flag "$1" ;;
  esac
  case $1 in
    --config) NGRPO_CONFIG=$2 ;;
    --workdir) NGRPO_WORKDIR=$2 ;;
    --cache) NGRPO_CACHE_DIR=$2 ;;
    --processes) processes=$2 ;;
    --port) port=$2 ;;
  esac
  shift 2
done
require NGRPO_CONFIG --config
require NGRPO_WORKDIR --workdir
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes $processes is not a number above 0"
gpus=$(count_gpus)
((gpus % processes == 0)) || die "$gpus GPUs cannot be shared evenly by --processes $processes"

# shellcheck source=flags.env
source "$LAUNCH/gpu/flags.env"
[[ -z ${NGRPO_CACHE_DIR:-} ]] || export JAX_COMPILATION_CACHE_DIR=$NGRPO_CACHE_DIR
python=${NGRPO_PYTHON:-$REPO/.venv/bin/python}
[[ $DRY_RUN == true ]] || command -v "$python" >/dev/null ||
  die "no interpreter at $python; make .venv first (docs/launch.md, GPU), or set NGRPO_PYTHON"
command=("$python" -m ngrpo_jax.train "--config=$NGRPO_CONFIG" "--workdir=$NGRPO_WORKDIR" "${REST[@]}")

cd "$REPO"
if ((processes == 1)); then
  run exec "${command[@]}"
  exit 0
fi
[[ $DRY_RUN == true ]] || mkdir -p "$NGRPO_WORKDIR/logs"
for ((process = 0; process < processes; process++)); do
  start_process "$process"
done
[[ $DRY_RUN == true ]] || wait_for_all
