#!/usr/bin/env bash
# Stops the training on every worker of a TPU. The TPU stays, and goes on costing money: delete.sh.
#
#   stop.sh --name NAME --zone ZONE [--seconds N] [flag...]
#
# Asks the training to end and ends it hard after N seconds (60). run.sh with the same workdir resumes it from
# its last checkpoint. A babysit.sh that watches this TPU stops as well.
#   --project P, --ssh HOW   as for run.sh
#   --dry-run     print the call of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_PROJECT, NGRPO_SSH.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
seconds=60
while (($#)); do
  case $1 in
    --seconds)
      need_value "$@"
      [[ $2 =~ ^[0-9]+$ ]] || die "--seconds $2 is not a number"
      seconds=$2 && shift 2
      ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "stop.sh takes nothing after --"
require_tpu
on_workers all stop --seconds "$seconds"
