#!/usr/bin/env bash
# What the other scripts tell a TPU worker to do, over ssh. Runs there, in the home folder; nobody calls it by hand.
#
#   on_worker.sh setup  [--bucket B --mount DIR]
#   on_worker.sh start  --commit SHA --generation G --config C --workdir W [--cache D] [--env N=V]...
#                       [--bucket B --mount DIR] [--restart] -- [override...]
#   on_worker.sh status --workdir W
#   on_worker.sh log    --lines N [--follow]
#   on_worker.sh stop   --seconds N
#   on_worker.sh idle
#
# idle fails while a training runs. Any of them with --dry-run says what it would do. Code in ~/ngrpo, environment in ~/ngrpo_venv, and the
# last start in ~/ngrpo_run: log, pid, workdir, boot (which boot of the machine), exit (status at the end),
# stopped (there when stop.sh ended it).

# shellcheck source-path=SCRIPTDIR
# shellcheck source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

CODE=$HOME/ngrpo
ENVIRONMENT=$HOME/ngrpo_venv
RUN=$HOME/ngrpo_run

# Changes when the machine restarts: a process that is gone then did not crash.
this_boot() { cat "${NGRPO_BOOT_FILE:-/proc/sys/kernel/random/boot_id}"; }

recorded() { cat "$RUN/$1" 2>/dev/null || true; }

# The supervisor outlives the note of how the training ended by a moment.
alive() {
  local pid
  pid=$(recorded pid)
  [[ -n $pid && ! -e $RUN/exit && $(recorded boot) == "$(this_boot)" ]] && kill -0 "$pid" 2>/dev/null
}

# Sets STATE and DETAIL of the run of workdir $1 on this worker.
look_here() {
  DETAIL=""
  if [[ $(recorded workdir) != "$1" ]]; then
    STATE=idle
    ! alive || { STATE=other && DETAIL=$(recorded workdir); }
  elif alive; then
    STATE=running
    DETAIL=$(tail -c 400 "$RUN/log" | tr '\r' '\n' | awk 'NF { last = $0 } END { print last }' | cut -c 1-120)
  elif [[ $(recorded exit) == 0 ]]; then
    STATE=finished
  elif [[ -e $RUN/stopped ]]; then
    STATE=stopped
  elif [[ $(recorded boot) != "$(this_boot)" ]]; then
    STATE=interrupted DETAIL="the machine restarted"
  else
    # No status was written when the kernel killed the supervisor too, for want of memory.
    STATE=failed DETAIL="exit status $(recorded exit)"
  fi
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      PYTHON=$name && return 0
    fi
  done
  return 1
}

make_environment() {
  if find_python; then
    run "$PYTHON" -m venv "$ENVIRONMENT"
  else
    # The images of these TPUs are Ubuntu 22.04, whose Python is 3.10; uv brings a newer one along.
    run python3 -m pip install --quiet --user uv
    run python3 -m uv venv --quiet --seed --python 3.12 "$ENVIRONMENT"
  fi
}

mount_bucket() {
  local bucket=$1 folder=$2
  ! mountpoint -q "$folder" 2>/dev/null || return 0
  if ! command -v gcsfuse >/dev/null; then
    # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    run sudo curl -fsSo "$key" "$site/doc/apt-key.gpg"
    local line
    line="deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main"
    run sudo bash -c "echo $(quote "$line") > /etc/apt/sources.list.d/gcsfuse.list"
    run sudo apt-get -qq update
    run sudo apt-get -qq install -y gcsfuse
  fi
  run sudo mkdir -p "$folder"
  run sudo chown "$(id -u):$(id -g)" "$folder"
  # A checkpoint becomes valid by renaming its folder, and the other hosts must see that at once.
  run gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$bucket" "$folder"
}

setup() {
  local wanted
  wanted=$(cat "$CODE/requirements.txt" "$CODE/pyproject.toml" | cksum)
  [[ -x $ENVIRONMENT/bin/python ]] || make_environment
  if [[ $(cat "$ENVIRONMENT/installed" 2>/dev/null || true) != "$wanted" ]]; then
    run "$ENVIRONMENT/bin/python" -m pip install --quiet --progress-bar off -e "${CODE}[tpu]"
    [[ $DRY_RUN == true ]] || echo "$wanted" >"$ENVIRONMENT/installed"
  fi
  [[ -z $bucket ]] || mount_bucket "$bucket" "$folder"
  echo "$(hostname) is set up: commit $(cat "$CODE/COMMIT"), $("$ENVIRONMENT/bin/python" --version)"
}

# Runs the training and keeps how it ended. A process of its own, so that it outlives the ssh session.
supervise() {
  local status=0
  "$@" || status=$?
  echo "$status" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

stop() {
  local pid
  if ! alive; then
    echo "$(hostname): nothing is running"
    return
  fi
  pid=$(recorded pid)
  [[ $DRY_RUN == true ]] || touch "$RUN/stopped"
  # The pid is that of the supervisor, which leads a process group of its own.
  run kill -TERM -- "-$pid"
  [[ $DRY_RUN == false ]] || return 0
  for ((i = 0; i < seconds * 10; i++)); do
    kill -0 -- "-$pid" 2>/dev/null || break
    sleep 0.1
  done
  ! kill -0 -- "-$pid" 2>/dev/null || run kill -KILL -- "-$pid"
  echo "$(hostname): stopped"
}

idle() {
  ! alive || die "$(hostname) runs $(recorded workdir); its code cannot be changed before stop.sh"
}

start() {
  local has command
  has=$(cat "$CODE/COMMIT")
  [[ $has == "$commit" ]] || die "$(hostname) has commit $has and not $commit: run setup.sh first"
  if alive; then
    [[ $restart == true ]] || die "$(hostname) runs $(recorded workdir) already: stop.sh, or run.sh --restart"
    stop
  fi
  [[ -z $bucket ]] || mount_bucket "$bucket" "$folder"
  # First, so that the flags below add to one's own LIBTPU_INIT_ARGS.
  ((${#environment[@]} == 0)) || export "${environment[@]}"
  # shellcheck source=flags/v5e.env
  source "$CODE/launch/tpu/flags/$generation.env"
  # Loud when the TPU cannot be had; otherwise jax would train on the CPU without a word.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} PYTHONUNBUFFERED=1
  [[ -z $cache ]] || export JAX_COMPILATION_CACHE_DIR=$cache
  command=("$ENVIRONMENT/bin/python" -m ngrpo_jax.train "--config=$config" "--workdir=$workdir" "${REST[@]}")
  if [[ $DRY_RUN == true ]]; then
    show "${command[@]}"
    return
  fi
  mkdir -p "$RUN"
  rm -f "$RUN/exit" "$RUN/stopped"
  cd "$CODE"
  echo "== $(date -u +%FT%TZ) $(hostname) commit $commit: $(quote "${command[@]}")" >>"$RUN/log"
  setsid nohup bash "$CODE/launch/tpu/on_worker.sh" supervise -- "${command[@]}" >>"$RUN/log" 2>&1 </dev/null &
  echo $! >"$RUN/pid"
  this_boot >"$RUN/boot"
  printf '%s\n' "$workdir" >"$RUN/workdir"
  echo "$(hostname): started"
}

verb=${1:---help}
(($# == 0)) || shift
split_flags "$@"
set -- "${ARGS[@]}"
bucket="" folder=/mnt/ngrpo commit="" generation="" config="" workdir="" cache="" lines=50 seconds=60
restart=false follow=false environment=()
while (($#)); do
  case $1 in
    --dry-run) DRY_RUN=true && shift && continue ;;
    --restart) restart=true && shift && continue ;;
    --follow) follow=true && shift && continue ;;
  esac
  need_value "$@"
  case $1 in
    --bucket) bucket=$2 ;;
    --mount) folder=$2 ;;
    --commit) commit=$2 ;;
    --generation) generation=$2 ;;
    --config) config=$2 ;;
    --workdir) workdir=$2 ;;
    --cache) cache=$2 ;;
    --env) environment+=("$2") ;;
    --lines) lines=$2 ;;
    --seconds) seconds=$2 ;;
    *) unknown_flag "$1" ;;
  esac
  shift 2
done

case $verb in
  --help | -h) show_help ;;
  setup | start | stop | idle) "$verb" ;;
  supervise) supervise "${REST[@]}" ;;
  status)
    look_here "$workdir"
    echo "ngrpo-status $(hostname) $STATE $DETAIL"
    ;;
  log)
    words=(tail -n "$lines")
    [[ $follow == false ]] || words+=(-F)
    run "${words[@]}" "$RUN/log"
    ;;
  *) die "unknown verb $verb; ${0##*/} --help lists them" ;;
esac
