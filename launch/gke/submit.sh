#!/usr/bin/env bash
# Runs a training on a TPU slice of the GKE cluster that kubectl points at.
#
#   submit.sh --job NAME --image IMAGE --type v6e --topology 4x4 --hosts 4 --chips 4 --bucket BUCKET \
#       --service-account KSA --config configs/X.py --workdir /bucket/runs/first [flag...] [-- --config.a.b=value...]
#
# Needs the JobSet controller in the cluster, and an image made by the Dockerfile beside this script. The bucket is
# mounted at /bucket, where the workdir must be. The same workdir resumes a run.
#   --type G        v4, v5e, v5p or v6e
#   --topology T    of the slice, as its node pool has it: 2x4, 4x4, 2x2x1, ...
#   --hosts N       hosts of the slice: one Pod each
#   --chips N       chips of a host
#   --spot          on spot nodes
#   --max-restarts N   how often the slice may be started again: 20
#   --dry-run       print the manifest and send nothing
#
# From the environment: NGRPO_JOB, NGRPO_IMAGE, NGRPO_BUCKET, NGRPO_SERVICE_ACCOUNT, NGRPO_CONFIG, NGRPO_WORKDIR,
# NGRPO_SPOT=true.

# shellcheck source-path=SCRIPTDIR
# shellcheck source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# A text as a JSON string, which YAML reads as the same text.
json() {
  local text=${1//\\/\\\\}
  [[ $text != *[[:cntrl:]]* ]] || die "control characters in $(quote "$1")"
  printf '"%s"' "${text//\"/\\\"}"
}

json_list() {
  local word separator=""
  printf '['
  for word in "$@"; do
    printf '%s%s' "$separator" "$(json "$word")"
    separator=", "
  done
  printf ']'
}

# fill NAME VALUE: one placeholder of the manifest.
fill() { manifest=${manifest//"\${$1}"/"$2"}; }

split_flags "$@"
set -- "${ARGS[@]}"
generation="" topology="" hosts="" chips="" restarts=20
while (($#)); do
  case $1 in
    --help | -h) show_help ;;
    --dry-run) DRY_RUN=true && shift && continue ;;
    --spot) NGRPO_SPOT=true && shift && continue ;;
    --job | --image | --type | --topology | --hosts | --chips | --bucket | --service-account | --config | --workdir | \
      --max-restarts) need_value "$@" ;;
    *) unknown_flag "$1" ;;
  esac
  case $1 in
    --job) NGRPO_JOB=$2 ;;
    --image) NGRPO_IMAGE=$2 ;;
    --bucket) NGRPO_BUCKET=$2 ;;
    --service-account) NGRPO_SERVICE_ACCOUNT=$2 ;;
    --config) NGRPO_CONFIG=$2 ;;
    --workdir) NGRPO_WORKDIR=$2 ;;
    --type) generation=$2 ;;
    --topology) topology=$2 ;;
    --hosts) hosts=$2 ;;
    --chips) chips=$2 ;;
    --max-restarts) restarts=$2 ;;
  esac
  shift 2
done
require NGRPO_JOB --job
require NGRPO_IMAGE --image
require NGRPO_BUCKET --bucket
require NGRPO_SERVICE_ACCOUNT --service-account
require NGRPO_CONFIG --config
require NGRPO_WORKDIR --workdir
[[ $NGRPO_WORKDIR == /bucket/?* ]] || die "workdir $NGRPO_WORKDIR is not below /bucket, where the bucket is mounted"
[[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die "--topology '$topology' is not like 2x4 or 2x2x1"
for number in "$hosts" "$chips" "$restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || die "--hosts, --chips and --max-restarts must be numbers, and '$number' is not"
done
case $generation in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *) die "--type '$generation' is none of v4, v5e, v5p, v6e" ;;
esac
# shellcheck source=../tpu/flags/v5e.env
source "$LAUNCH/tpu/flags/$generation.env"

manifest=$(grep -v '^ *#' "$LAUNCH/gke/jobset.yaml")
if [[ ${NGRPO_SPOT:-false} == true ]]; then
  fill NGRPO_SPOT_SELECTOR 'cloud.google.com/gke-spot: "true"'
else
  manifest=$(grep -v NGRPO_SPOT_SELECTOR <<<"$manifest")
fi
fill NGRPO_JOB "$(json "$NGRPO_JOB")"
fill NGRPO_IMAGE "$(json "$NGRPO_IMAGE")"
fill NGRPO_BUCKET "$(json "$NGRPO_BUCKET")"
fill NGRPO_SERVICE_ACCOUNT "$(json "$NGRPO_SERVICE_ACCOUNT")"
fill NGRPO_ACCELERATOR "$accelerator"
fill NGRPO_TOPOLOGY "$(json "$topology")"
fill NGRPO_HOSTS "$hosts"
fill NGRPO_CHIPS "$chips"
fill NGRPO_MAX_RESTARTS "$restarts"
fill NGRPO_FLAGS "$(json "${LIBTPU_INIT_ARGS% }")"
fill NGRPO_ARGUMENTS \
  "$(json_list ngrpo_jax.train "--config=$NGRPO_CONFIG" "--workdir=$NGRPO_WORKDIR" "${REST[@]}")"

if [[ $DRY_RUN == true ]]; then
  printf '%s\n' "$manifest"
  exit 0
fi
command -v kubectl >/dev/null || die "kubectl is not on PATH"
kubectl apply -f - <<<"$manifest"
note "submitted; watch it: kubectl get jobset $(quote "$NGRPO_JOB")"
note "end it: kubectl delete jobset $(quote "$NGRPO_JOB")"
