#!/usr/bin/env bash
# Deletes a TPU and everything on its disks. The workdir on shared storage stays.
#
#   delete.sh --name NAME --zone ZONE --yes [--queued] [flag...]
#
#   --yes         do it; without this flag nothing is deleted
#   --queued      delete the queued resource of that name, together with its TPU
#   --project P   Google Cloud project; gcloud's own default otherwise
#   --dry-run     print the call of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_PROJECT, NGRPO_QUEUED=true.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
yes=false
while (($#)); do
  case $1 in
    --yes) yes=true && shift ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "delete.sh takes nothing after --"
require_tpu

if [[ ${NGRPO_QUEUED:-false} == true ]]; then
  # Without --force a queued resource whose TPU still exists is not deleted.
  tpu_command queued-resources delete "$NGRPO_TPU_NAME" --force
else
  tpu_command tpu-vm delete "$NGRPO_TPU_NAME"
fi
if [[ $yes == false && $DRY_RUN == false ]]; then
  show "${COMMAND[@]}"
  die "nothing was deleted; this deletes $NGRPO_TPU_NAME and its disks: pass --yes to do it"
fi
run "${COMMAND[@]}"
