#!/usr/bin/env bash
# Starts a training on every worker of a TPU and returns; the training goes on by itself.
#
#   run.sh --name NAME --zone ZONE --type TYPE --config configs/X.py --workdir DIR [flag...]
#       [-- --config.a.b=value...]
#
# The same workdir resumes a run from its last checkpoint. What follows "--" goes to the train command.
#   --workdir DIR   on storage that every worker shares and that outlives the TPU: an absolute path, for example
#                   below the bucket that setup.sh mounted
#   --commit C      the commit that the workers must have: HEAD by default
#   --bucket B, --mount DIR   as given to setup.sh: mounted again where a machine has restarted
#   --cache DIR     shared folder for compiled programs: a restart does not compile again
#   --env NAME=VALUE   in the environment of the training, as often as needed
#   --restart       stop a training that is running there first
#   --project P     Google Cloud project; gcloud's own default otherwise
#   --ssh HOW       external (default), internal or iap
#   --dry-run       print the calls of gcloud and make none
#
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_TPU_TYPE, NGRPO_PROJECT, NGRPO_CONFIG,
# NGRPO_WORKDIR, NGRPO_BUCKET, NGRPO_MOUNT, NGRPO_CACHE_DIR, NGRPO_SSH.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
commit=HEAD
words=()
while (($#)); do
  case $1 in
    --config) need_value "$@" && NGRPO_CONFIG=$2 && shift 2 ;;
    --workdir) need_value "$@" && NGRPO_WORKDIR=$2 && shift 2 ;;
    --cache) need_value "$@" && NGRPO_CACHE_DIR=$2 && shift 2 ;;
    --bucket) need_value "$@" && NGRPO_BUCKET=$2 && shift 2 ;;
    --mount) need_value "$@" && NGRPO_MOUNT=$2 && shift 2 ;;
    --commit) need_value "$@" && commit=$2 && shift 2 ;;
    --env)
      need_value "$@"
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $2 is not NAME=VALUE"
      words+=(--env "$2") && shift 2
      ;;
    --restart) words+=(--restart) && shift ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
require_tpu
tpu_generation
require NGRPO_CONFIG --config
require NGRPO_WORKDIR --workdir
check_workdir "$NGRPO_WORKDIR"
sha=$(git -C "$REPO" rev-parse --verify --quiet "$commit^{commit}") ||
  die "$commit is no commit of the repository in $REPO"

words+=(--commit "$sha" --generation "$GENERATION" --config "$NGRPO_CONFIG" --workdir "$NGRPO_WORKDIR")
[[ -z ${NGRPO_CACHE_DIR:-} ]] || words+=(--cache "$NGRPO_CACHE_DIR")
[[ -z ${NGRPO_BUCKET:-} ]] || words+=(--bucket "$NGRPO_BUCKET" --mount "${NGRPO_MOUNT:-/mnt/ngrpo}")
on_workers all start "${words[@]}" -- "${REST[@]}"
note "started; watch it: logs.sh --follow, status.sh, or let babysit.sh do so"
