#!/usr/bin/env bash
# Shows what the training prints on a worker. Every worker keeps its own log, in ~/ngrpo_run/log.
#
#   logs.sh --name NAME --zone ZONE [--worker N|all] [--lines N] [--follow] [flag...]
#
#   --worker W    which worker: 0 by default, or all
#   --lines N     how many lines from the end: 50 by default
#   --follow      go on showing new lines until interrupted
#   --project P, --ssh HOW   as for run.sh
#   --dry-run     print the call of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_PROJECT, NGRPO_SSH.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
worker=0
words=(--lines 50)
while (($#)); do
  case $1 in
    --worker) need_value "$@" && worker=$2 && shift 2 ;;
    --lines)
      need_value "$@"
      [[ $2 =~ ^[0-9]+$ ]] || die "--lines $2 is not a number"
      words+=(--lines "$2") && shift 2
      ;;
    --follow) words+=(--follow) && shift ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "logs.sh takes nothing after --"
require_tpu
on_workers "$worker" log "${words[@]}"
