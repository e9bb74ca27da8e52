#!/usr/bin/env bash
# Asks for a TPU.
#
#   create.sh --name NAME --zone ZONE --type TYPE [--queued] [--spot] [--wait] [flag...]
#
# On demand by default: made at once, or refused when there is none to be had.
#   --spot            cheap, and taken away when somebody else needs it (babysit.sh brings it back)
#   --queued          ask as a queued resource of the same name: waits in line until there is one
#   --wait            return when the TPU is ready (it costs money from then on)
#   --type TYPE       accelerator type: v4-8, v5litepod-8, v5p-8, v6e-8, ...
#   --image VERSION   TPU software version; the default is the generation's, from flags/
#   --service-account ADDRESS   whom the workers act as, for example to read a bucket
#   --gcloud-flag F   one more word for gcloud's create, as often as needed: --gcloud-flag=--network=lab
#   --project P       Google Cloud project; gcloud's own default otherwise
#   --dry-run         print the calls of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_TPU_TYPE, NGRPO_PROJECT, NGRPO_QUEUED=true,
# NGRPO_SPOT=true, NGRPO_RUNTIME_VERSION, NGRPO_SERVICE_ACCOUNT, NGRPO_POLL_SECONDS (60).

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

wait_until_ready() {
  local said="" troubles=0
  while true; do
    tpu_situation
    [[ $DETAIL == "$said" ]] || note "$NGRPO_TPU_NAME: $DETAIL"
    said=$DETAIL
    case $SITUATION in
      ready) return ;;
      waiting) troubles=0 ;;
      error)
        ((++troubles < 10)) || { note "error: $NGRPO_TPU_NAME could not be asked after, ten times in a row" && exit 1; }
        ;;
      *) note "error: $NGRPO_TPU_NAME is $SITUATION ($DETAIL) instead of getting ready" && exit 1 ;;
    esac
    sleep "${NGRPO_POLL_SECONDS:-60}"
  done
}

split_flags "$@"
set -- "${ARGS[@]}"
wait=false
extra=()
while (($#)); do
  case $1 in
    --spot) NGRPO_SPOT=true && shift ;;
    --wait) wait=true && shift ;;
    --image) need_value "$@" && NGRPO_RUNTIME_VERSION=$2 && shift 2 ;;
    --service-account) need_value "$@" && NGRPO_SERVICE_ACCOUNT=$2 && shift 2 ;;
    --gcloud-flag) need_value "$@" && extra+=("$2") && shift 2 ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "create.sh takes nothing after --; more words for gcloud: --gcloud-flag=WORD"
require_tpu
tpu_generation
# shellcheck source=flags/v5e.env
source "$TPU_DIR/flags/$GENERATION.env"

[[ ${NGRPO_SPOT:-false} != true ]] || extra+=(--spot)
[[ -z ${NGRPO_SERVICE_ACCOUNT:-} ]] || extra+=("--service-account=$NGRPO_SERVICE_ACCOUNT")
if [[ ${NGRPO_QUEUED:-false} == true ]]; then
  tpu_command queued-resources create "$NGRPO_TPU_NAME" "--node-id=$NGRPO_TPU_NAME" \
    "--accelerator-type=$NGRPO_TPU_TYPE" "--runtime-version=$NGRPO_RUNTIME_VERSION" "${extra[@]}"
else
  tpu_command tpu-vm create "$NGRPO_TPU_NAME" \
    "--accelerator-type=$NGRPO_TPU_TYPE" "--version=$NGRPO_RUNTIME_VERSION" "${extra[@]}"
fi
run "${COMMAND[@]}"

[[ $wait == false || $DRY_RUN == true ]] || wait_until_ready
note "asked for; next: setup.sh, then run.sh. Delete it when done: delete.sh --yes"
