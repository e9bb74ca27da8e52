#!/usr/bin/env bash
# Keeps a training going on a TPU until it is finished.
#
#   babysit.sh --name NAME --zone ZONE --type TYPE --config configs/X.py --workdir DIR [flag...]
#       [-- --config.a.b=value...]
#
# Looks every minute. A TPU that the service took away is deleted (nothing can be done with it any more), asked
# for again, set up, and the training started with the same workdir, so that it resumes. A machine that restarted
# has its training started again. When the training itself fails, on a TPU that is still there, that is a crash:
# its last lines are shown and babysit ends, because the same again would cost money and end the same way. What
# failed or was stopped before babysit came is started again, with the commit that babysit was given.
#   --create          ask for the TPU when it does not exist at the beginning
#   --spot, --queued, --image V, --service-account A, --gcloud-flag F   how to ask for it, as for create.sh
#   --max-restarts N  give up after so many recoveries: 20
#   --max-errors N    give up after so many failed calls in a row: 60
#   --delete-when-done   delete the TPU when the training is finished; it costs money until then
#   --commit C, --bucket B, --mount DIR, --cache DIR, --env NAME=VALUE, --project P, --ssh HOW   as for setup.sh, run.sh
#   --dry-run         print what would be called and call nothing
#
# Ends with 0 when the training is finished, with 1 when it gave up. Ending babysit leaves the training running.
# From the environment: what the other scripts read, and NGRPO_POLL_SECONDS (60), NGRPO_CRASH_GRACE_SECONDS (120:
# how long after a failure the TPU may still be reported as taken away).

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

say() { note "$(date -u +%H:%M:%S) $NGRPO_TPU_NAME: $*"; }

give_up() {
  say "giving up: $*"
  exit 1
}

# Something that did not work this time, and may the next: no capacity, no connection, no answer.
trouble() {
  ((++errors < max_errors)) || give_up "$1; that was failure $errors in a row"
  say "$1; trying again (failure $errors of at most $max_errors)"
}

# Counts one recovery, and gives up when there were too many.
recover() {
  ((++restarts <= max_restarts)) || give_up "$1, and the $max_restarts restarts of --max-restarts are used up"
  say "$1; recovery $restarts of at most $max_restarts"
}

create() {
  say "asking for a TPU"
  "$TPU_DIR/create.sh" "${create_words[@]}" || { trouble "it could not be asked for" && return; }
  may_create=false
}

# Deletes what the service took away; fails when that has to be tried again.
replace() {
  # Counted once, however often the deletion has to be tried.
  [[ $counted == true ]] || recover "the service took it away ($DETAIL)"
  counted=true
  "$TPU_DIR/delete.sh" --yes || { trouble "it could not be deleted" && return 1; }
  counted=false may_create=true
}

# begin WORDS...: start the training, with words for run.sh.
begin() {
  excused=false
  if "$TPU_DIR/run.sh" "${run_words[@]}" "$@" -- "${REST[@]}"; then
    errors=0 ours=true
  else
    trouble "the training could not be started"
  fi
}

prepare_and_begin() {
  excused=false
  if "$TPU_DIR/setup.sh" "${setup_words[@]}"; then
    begin --restart
  else
    trouble "it could not be set up"
  fi
}

finish() {
  say "the training is finished: $NGRPO_WORKDIR"
  [[ $delete_when_done == false ]] || "$TPU_DIR/delete.sh" --yes || give_up "finished, but not deleted: delete.sh --yes"
  exit 0
}

# A failed training may be the first sign of a preemption: the processes die before the service says so.
crash_or_not() {
  say "the training failed; looking again in $grace seconds whether the TPU was taken away"
  sleep "$grace"
  tpu_situation
  if [[ $SITUATION != ready ]]; then
    say "the TPU is $SITUATION ($DETAIL), so this was no crash"
    excused=true
    return
  fi
  run_situation "$NGRPO_WORKDIR"
  case $RUN_STATE in
    failed) ;;
    unreachable) trouble "its workers cannot be reached" && return ;;
    *) return ;;
  esac
  note "${RUN_LINES//ngrpo-status /  }"
  "$TPU_DIR/logs.sh" --worker=all --lines=30 >&2 || true
  give_up "the training crashed on a TPU that is in order; with the cause mended, start babysit.sh again"
}

tend() {
  run_situation "$NGRPO_WORKDIR"
  if [[ $ours == false ]]; then
    case $RUN_STATE in
      idle | failed | stopped | interrupted | partial)
        say "the training is $RUN_STATE from before; setting up and starting it"
        RUN_STATE=unprepared
        ;;
    esac
  fi
  case $RUN_STATE in
    running) errors=0 ours=true ;;
    finished) finish ;;
    unprepared) prepare_and_begin ;;
    idle) begin ;;
    interrupted) recover "a machine restarted" && begin --restart ;;
    partial) recover "not every worker has the training" && begin --restart ;;
    failed)
      if [[ $excused == true ]]; then
        recover "the TPU is back" && begin --restart
      else
        crash_or_not
      fi
      ;;
    stopped) give_up "the training was stopped by stop.sh" ;;
    other) give_up "it trains another workdir"$'\n'"$RUN_LINES" ;;
    unreachable) trouble "its workers cannot be reached" ;;
  esac
}

watch() {
  local said=""
  while true; do
    tpu_situation
    [[ $DETAIL == "$said" ]] || say "$SITUATION ($DETAIL)"
    said=$DETAIL
    case $SITUATION in
      ready) may_create=false && tend ;;
      waiting) errors=0 ;;
      lost) if replace; then continue; fi ;;
      absent)
        [[ $may_create == true ]] || give_up "it does not exist, and --create was not given"
        create
        ;;
      stopped) give_up "somebody stopped or withdrew it ($DETAIL)" ;;
      refused) give_up "the queued request was refused; delete.sh --queued --yes, then ask for something else" ;;
      error) trouble "the service gave no answer" ;;
    esac
    sleep "$poll"
  done
}

plan() {
  note "Each minute: ask for the state of the TPU and of the run; then, as needed, the following."
  note "absent, after a loss or at the beginning (then only with --create):"
  "$TPU_DIR/create.sh" "${create_words[@]}" --dry-run
  note "taken away:"
  "$TPU_DIR/delete.sh" --dry-run
  note "ready and not set up:"
  "$TPU_DIR/setup.sh" "${setup_words[@]}" --dry-run
  note "ready and not running:"
  "$TPU_DIR/run.sh" "${run_words[@]}" --restart --dry-run -- "${REST[@]}"
}

split_flags "$@"
set -- "${ARGS[@]}"
create_words=() setup_words=() run_words=()
# ours: babysit has seen the training run, or started it.
may_create=false delete_when_done=false counted=false excused=false ours=false
restarts=0 errors=0 max_restarts=20 max_errors=60
poll=${NGRPO_POLL_SECONDS:-60} grace=${NGRPO_CRASH_GRACE_SECONDS:-120}
while (($#)); do
  case $1 in
    --create) may_create=true && shift && continue ;;
    --delete-when-done) delete_when_done=true && shift && continue ;;
    --spot) NGRPO_SPOT=true && shift && continue ;;
    --config | --workdir | --cache | --env | --commit | --bucket | --mount | --image | --service-account | \
      --gcloud-flag | --max-restarts | --max-errors) need_value "$@" ;;
    *) tpu_flag "$@" && shift "$USED" && continue ;;
  esac
  case $1 in
    --config) NGRPO_CONFIG=$2 ;;
    --workdir) NGRPO_WORKDIR=$2 ;;
    --cache) NGRPO_CACHE_DIR=$2 ;;
    --bucket) NGRPO_BUCKET=$2 ;;
    --mount) NGRPO_MOUNT=$2 ;;
    --image) NGRPO_RUNTIME_VERSION=$2 ;;
    --service-account) NGRPO_SERVICE_ACCOUNT=$2 ;;
    --gcloud-flag) create_words+=("$1=$2") ;;
    --env) run_words+=("$1=$2") ;;
    # The commit is fixed now: a later one must not slip into a run that is under way.
    --commit) commit=$2 ;;
    --max-restarts | --max-errors)
      [[ $2 =~ ^[0-9]+$ ]] || die "$1 $2 is not a number"
      if [[ $1 == --max-restarts ]]; then max_restarts=$2; else max_errors=$2; fi
      ;;
  esac
  shift 2
done
require_tpu
tpu_generation
require NGRPO_CONFIG --config
require NGRPO_WORKDIR --workdir
check_workdir "$NGRPO_WORKDIR"
sha=$(git -C "$REPO" rev-parse --verify --quiet "${commit:-HEAD}^{commit}") ||
  die "${commit:-HEAD} is no commit of the repository in $REPO"
setup_words+=(--commit "$sha" --ignore-uncommitted)
run_words+=(--commit "$sha")
# The scripts that babysit calls find the rest here.
export NGRPO_TPU_NAME NGRPO_ZONE NGRPO_TPU_TYPE NGRPO_CONFIG NGRPO_WORKDIR \
  NGRPO_PROJECT="${NGRPO_PROJECT:-}" NGRPO_QUEUED="${NGRPO_QUEUED:-false}" NGRPO_SPOT="${NGRPO_SPOT:-false}" \
  NGRPO_SSH="${NGRPO_SSH:-external}" NGRPO_CACHE_DIR="${NGRPO_CACHE_DIR:-}" NGRPO_BUCKET="${NGRPO_BUCKET:-}" \
  NGRPO_MOUNT="${NGRPO_MOUNT:-/mnt/ngrpo}" NGRPO_RUNTIME_VERSION="${NGRPO_RUNTIME_VERSION:-}" \
  NGRPO_SERVICE_ACCOUNT="${NGRPO_SERVICE_ACCOUNT:-}"

if [[ $DRY_RUN == true ]]; then
  plan
else
  if [[ -z ${commit:-} && -n $(git -C "$REPO" status --porcelain --untracked-files=no) ]]; then
    die "uncommitted changes would not be sent: commit them, or name what to run with --commit"
  fi
  watch
fi
