#!/usr/bin/env bash
# Says what state a TPU is in, and what the run of a workdir does on each of its workers.
#
#   status.sh --name NAME --zone ZONE [--workdir DIR] [--queued] [flag...]
#
#   --workdir DIR   the run to ask after; without it, only the TPU
#   --queued        the TPU was asked for as a queued resource
#   --project P, --ssh HOW   as for run.sh
#   --dry-run       print the calls of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_PROJECT, NGRPO_QUEUED=true, NGRPO_WORKDIR, NGRPO_SSH.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --workdir) need_value "$@" && NGRPO_WORKDIR=$2 && shift 2 ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "status.sh takes nothing after --"
require_tpu

tpu_situation
if [[ $DRY_RUN == true ]]; then
  [[ -z ${NGRPO_WORKDIR:-} ]] || on_workers all status --workdir "$NGRPO_WORKDIR"
  exit 0
fi
echo "$NGRPO_TPU_NAME is $SITUATION ($DETAIL)"
[[ $SITUATION == ready && -n ${NGRPO_WORKDIR:-} ]] || exit 0
run_situation "$NGRPO_WORKDIR"
echo "$NGRPO_WORKDIR is $RUN_STATE"
echo "${RUN_LINES//ngrpo-status /  }"
