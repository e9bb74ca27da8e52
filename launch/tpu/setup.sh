#!/usr/bin/env bash
# Brings one commit and its environment to every worker of a TPU.
#
#   setup.sh --name NAME --zone ZONE [--commit COMMIT] [--bucket BUCKET --mount DIR] [flag...]
#
# Sends the commit as an archive to ~/ngrpo on each worker, makes ~/ngrpo_venv there and installs the
# requirements with the TPU wheels of jax. Run it again after every commit; what is installed stays. The code of a
# training that runs is never changed under it: another commit waits until stop.sh.
#   --commit C    what to send: HEAD by default. Changes that are not committed are not sent, and refused
#   --ignore-uncommitted   send the commit although the working tree differs from it
#   --bucket B    mount this bucket with gcsfuse, at --mount DIR (/mnt/ngrpo by default), on every worker
#   --ssh HOW     external (default), internal (from inside the same network) or iap (through a tunnel)
#   --project P   Google Cloud project; gcloud's own default otherwise
#   --dry-run     print the calls of gcloud and make none
#
# With more than one worker, gcloud needs the key in the agent: ssh-add ~/.ssh/google_compute_engine
# From the environment: NGRPO_TPU_NAME, NGRPO_ZONE, NGRPO_PROJECT, NGRPO_BUCKET, NGRPO_MOUNT, NGRPO_SSH.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

split_flags "$@"
set -- "${ARGS[@]}"
commit=HEAD
ignore=false
while (($#)); do
  case $1 in
    --commit) need_value "$@" && commit=$2 && shift 2 ;;
    --ignore-uncommitted) ignore=true && shift ;;
    --bucket) need_value "$@" && NGRPO_BUCKET=$2 && shift 2 ;;
    --mount) need_value "$@" && NGRPO_MOUNT=$2 && shift 2 ;;
    *) tpu_flag "$@" && shift "$USED" ;;
  esac
done
((${#REST[@]} == 0)) || die "setup.sh takes nothing after --"
require_tpu

sha=$(git -C "$REPO" rev-parse --verify --quiet "$commit^{commit}") ||
  die "$commit is no commit of the repository in $REPO; setup.sh sends a commit"
if [[ $ignore == false && -n $(git -C "$REPO" status --porcelain --untracked-files=no) ]]; then
  die "uncommitted changes would not be sent: commit them, or pass --ignore-uncommitted"
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$REPO" archive --format=tar.gz -o "$folder/ngrpo.tar.gz" "$sha"

scp_command "$folder/ngrpo.tar.gz" ngrpo.tar.gz
run "${COMMAND[@]}" </dev/null

# The folder is swapped in whole, so that a broken transfer leaves the old commit as it was.
worker=ngrpo/launch/tpu/on_worker.sh
has_it="[ \"\$(cat ngrpo/COMMIT 2>/dev/null)\" = $sha ]"
is_idle="{ [ ! -f $worker ] || bash $worker idle; }"
swap="rm -rf ngrpo.new && mkdir ngrpo.new && tar -xzf ngrpo.tar.gz -C ngrpo.new && echo $sha > ngrpo.new/COMMIT && \
rm -rf ngrpo && mv ngrpo.new ngrpo"
ssh_command all "$has_it || { $is_idle && $swap; }"
run "${COMMAND[@]}" </dev/null

words=(setup)
[[ -z ${NGRPO_BUCKET:-} ]] || words+=(--bucket "$NGRPO_BUCKET" --mount "${NGRPO_MOUNT:-/mnt/ngrpo}")
on_workers all "${words[@]}"
note "every worker has commit $sha; next: run.sh"
