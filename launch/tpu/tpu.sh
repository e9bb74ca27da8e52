# shellcheck shell=bash
#
# What the TPU scripts share: their common flags, the calls of gcloud, and what state a TPU is in.
# Sourced, never run; functions give their answers in the variables that they name in capitals.

# shellcheck disable=SC2034  # those variables are read by the scripts that source this file
# shellcheck source-path=SCRIPTDIR
# shellcheck source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

TPU_DIR=$LAUNCH/tpu
# Ends a connection whose machine was taken away, which would otherwise hang.
PATIENCE=("-o ConnectTimeout=20" "-o ServerAliveInterval=15")

# Handles the flag $1 that all TPU scripts know; USED says how many words it took.
tpu_flag() {
  USED=1
  case $1 in
    --help | -h) show_help ;;
    --dry-run) DRY_RUN=true && return ;;
    --queued) NGRPO_QUEUED=true && return ;;
    --name | --zone | --project | --type | --ssh) need_value "$@" ;;
    *) unknown_flag "$1" ;;
  esac
  USED=2
  case $1 in
    --name) NGRPO_TPU_NAME=$2 ;;
    --zone) NGRPO_ZONE=$2 ;;
    --project) NGRPO_PROJECT=$2 ;;
    --type) NGRPO_TPU_TYPE=$2 ;;
    --ssh) NGRPO_SSH=$2 ;;
  esac
}

# The names that every call needs. A leading dash would turn a name into a flag of gcloud.
require_tpu() {
  require NGRPO_TPU_NAME --name
  require NGRPO_ZONE --zone
  [[ $NGRPO_TPU_NAME != -* ]] || die "the TPU name $NGRPO_TPU_NAME begins with a dash"
  [[ $DRY_RUN == true ]] || command -v gcloud >/dev/null ||
    die "gcloud is not on PATH; install the Google Cloud SDK: https://cloud.google.com/sdk/docs/install"
}

# v4, v5e, v5p or v6e: the generation that an accelerator type belongs to.
tpu_generation() {
  require NGRPO_TPU_TYPE --type
  case $NGRPO_TPU_TYPE in
    v4-*) GENERATION=v4 ;;
    v5e-*) die "TPU type $NGRPO_TPU_TYPE: gcloud calls v5e v5litepod; write v5litepod-${NGRPO_TPU_TYPE#v5e-}" ;;
    v5litepod-*) GENERATION=v5e ;;
    v5p-*) GENERATION=v5p ;;
    v6e-*) GENERATION=v6e ;;
    *) die "TPU type $NGRPO_TPU_TYPE is none of v4-N, v5litepod-N, v5p-N, v6e-N" ;;
  esac
}

# tpu_command GROUP VERB NAME [flag...] sets COMMAND, with zone and project; --quiet: gcloud never asks.
tpu_command() {
  COMMAND=(gcloud --quiet compute tpus "$@" "--zone=$NGRPO_ZONE")
  [[ -z ${NGRPO_PROJECT:-} ]] || COMMAND+=("--project=$NGRPO_PROJECT")
}

# ssh_command WORKER REMOTE sets COMMAND: the shell string REMOTE on one worker or on all.
ssh_command() {
  tpu_command tpu-vm ssh "$NGRPO_TPU_NAME" "--worker=$1" "--command=$2" "${PATIENCE[@]/#/--ssh-flag=}"
  reach
}

# scp_command SOURCE DESTINATION sets COMMAND: a local file to every worker.
scp_command() {
  tpu_command tpu-vm scp "$1" "$NGRPO_TPU_NAME:$2" --worker=all "${PATIENCE[@]/#/--scp-flag=}"
  reach
}

# Adds to COMMAND how the workers are reached; tunnels are known to the alpha track alone.
reach() {
  case ${NGRPO_SSH:-external} in
    external) ;;
    internal) COMMAND+=(--internal-ip) ;;
    iap) COMMAND=(gcloud --quiet alpha "${COMMAND[@]:2}" --tunnel-through-iap) ;;
    *) die "--ssh $NGRPO_SSH is none of external, internal, iap" ;;
  esac
}

# on_workers WORKER VERB [word...]: a verb of on_worker.sh over there. The path is relative to the home.
on_workers() {
  local worker=$1
  shift
  ssh_command "$worker" "bash ngrpo/launch/tpu/on_worker.sh $(quote "$@")"
  run "${COMMAND[@]}" </dev/null
}

# look FIELD GROUP NAME sets FOUND to a field of a resource, ABSENT, or ERROR with the reason on stderr.
look() {
  local problem
  tpu_command "$2" describe "$3" "--format=value($1)"
  if [[ $DRY_RUN == true ]]; then
    # As if all were well, so that the calls that would follow are shown too.
    show "${COMMAND[@]}"
    FOUND=READY
    [[ $2 == tpu-vm ]] || FOUND=ACTIVE
    return
  fi
  problem=$(mktemp)
  if FOUND=$("${COMMAND[@]}" 2>"$problem" </dev/null); then
    FOUND=${FOUND:-STATE_UNSPECIFIED}
  elif grep -q NOT_FOUND "$problem"; then
    FOUND=ABSENT
  else
    cat "$problem" >&2
    FOUND=ERROR
  fi
  rm -f "$problem"
}

# Sets SITUATION, one word for what can be done now, and DETAIL, what the service said:
#   ready     usable                        waiting   being made, repaired or deleted: look again
#   lost      taken away by the service     absent    does not exist
#   stopped   stopped by somebody           refused   the queued request failed for good
#   error     the service could not be asked
tpu_situation() {
  if [[ ${NGRPO_QUEUED:-false} == true ]]; then
    look "state.state,state.stateInitiator" queued-resources "$NGRPO_TPU_NAME"
    DETAIL="queued resource ${FOUND//$'\t'/, by }"
    case $FOUND in
      ACTIVE*) ;; # the node below knows more
      CREATING* | ACCEPTED* | PROVISIONING* | WAITING_FOR_RESOURCES* | DELETING* | STATE_UNSPECIFIED*)
        SITUATION=waiting && return
        ;;
      SUSPEND*USER) SITUATION=stopped && return ;;
      SUSPEND*) SITUATION=lost && return ;;
      FAILED*) SITUATION=refused && return ;;
      ABSENT) SITUATION=absent && return ;;
      *) SITUATION=error && return ;;
    esac
  fi
  look state tpu-vm "$NGRPO_TPU_NAME"
  DETAIL="node $FOUND"
  case $FOUND in
    READY) SITUATION=ready ;;
    # UNKNOWN is the service's word for a failed repair.
    PREEMPTED | TERMINATED | UNKNOWN) SITUATION=lost ;;
    STOPPED | STOPPING) SITUATION=stopped ;;
    ABSENT) if [[ ${NGRPO_QUEUED:-false} == true ]]; then SITUATION=waiting; else SITUATION=absent; fi ;;
    ERROR) SITUATION=error ;;
    *) SITUATION=waiting ;;
  esac
}

# Sets RUN_STATE, one word for the run of a workdir on all workers together, and RUN_LINES, what each said:
# running, finished, failed, interrupted, stopped, other, idle, unprepared, partial, or unreachable.
run_situation() {
  local states problem script=ngrpo/launch/tpu/on_worker.sh
  ssh_command all "if [ -f $script ]; then bash $script status $(quote --workdir "$1"); \
else echo ngrpo-status \$(hostname) unprepared; fi"
  problem=$(mktemp) # gcloud tells of every connection it makes; of interest only when one failed
  if RUN_LINES=$("${COMMAND[@]}" 2>"$problem" </dev/null); then
    RUN_LINES=$(grep '^ngrpo-status ' <<<"$RUN_LINES" || true)
  else
    cat "$problem" >&2
    RUN_LINES=""
  fi
  rm -f "$problem"
  states=" $(awk '{ print $3 }' <<<"$RUN_LINES" | sort -u | tr '\n' ' ')"
  # One host that lost its machine takes the processes of the others down with it, hence this order.
  for RUN_STATE in other unprepared interrupted failed stopped; do
    [[ $states != *" $RUN_STATE "* ]] || return 0
  done
  case $states in
    " running " | " finished running ") RUN_STATE=running ;;
    " finished ") RUN_STATE=finished ;;
    " idle ") RUN_STATE=idle ;;
    "  ") RUN_STATE=unreachable ;;
    *) RUN_STATE=partial ;;
  esac
}
