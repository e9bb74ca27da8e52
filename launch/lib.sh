# shellcheck shell=bash
#
# What the launch scripts share: messages, dry runs, flags and quoting. Sourced, never run.
# The comment at the top of a script is its --help.

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # for the scripts that source this file
REPO=$(dirname "$LAUNCH")
DRY_RUN=false

note() { printf '%s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

show_help() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
}

# Words as one shell string that means exactly these words to the shell that reads it.
quote() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

show() { printf '+ %s\n' "$(quote "$@")" >&2; }

# Says a command, then does it; only says it in a dry run.
run() {
  show "$@"
  [[ $DRY_RUN == true ]] || "$@"
}

# Sorts a command line into ARGS, with --flag=value as two words, and REST, what follows "--".
split_flags() {
  ARGS=() REST=()
  while (($#)); do
    case $1 in
      --)
        shift
        REST=("$@")
        return
        ;;
      --*=*) ARGS+=("${1%%=*}" "${1#*=}") ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
}

# need_value --flag value...: refuses a flag without its value.
need_value() {
  (($# >= 2)) || die "$1 needs a value"
  [[ -n $2 ]] || die "$1 is empty"
}

unknown_flag() {
  local more=""
  ! grep -q '^#.*\[-- ' "$0" || more='; flags of the command that it starts follow "--"'
  die "unknown argument $1; ${0##*/} --help lists them$more"
}

# require NAME FLAG: a setting that has no default and must come from its flag or the environment.
require() { [[ -n ${!1:-} ]] || die "$1 is not set; give $2 or export $1 (launch/env.example)"; }

# A workdir must mean the same place on every host, and after the machine was replaced.
check_workdir() {
  case $1 in
    /?*) ;;
    gs://*) die "workdir $1 is in a bucket; mount the bucket (docs/launch.md) and give the path below the mount" ;;
    *) die "workdir $1 is relative; every host needs the same place: an absolute path on shared storage" ;;
  esac
}
